"""Arguments of `prune_one_shot` that `experiments.compare` makes of the settings of a result."""

import math
from collections.abc import Sequence
from typing import Any

import fishleg_jax as flj
from experiments.models import training
from experiments.models.specs import Spec


def through(sparsities: Sequence[float], stages: int) -> list[float]:
    """Sparsities of stages, geometric in density from each given sparsity to the next.

    Args:
        sparsities: sparsities to pass through, rising.
        stages: number of stages, at least that of the sparsities.

    Returns:
        One sparsity per stage; the last is that of `sparsities`.
    """
    begins = [0.0, *sparsities[:-1]]
    lengths = [math.log((1 - a) / (1 - b)) for a, b in zip(begins, sparsities, strict=True)]
    counts = [1] * len(sparsities)
    while sum(counts) < stages:  # where the stages are longest
        longest = max(range(len(counts)), key=lambda i: lengths[i] / counts[i])
        counts[longest] += 1
    parts = zip(begins, sparsities, counts, strict=True)
    return [s for a, b, n in parts for s in flj.stage_sparsities(b, n, initial=a)]


def compensation(settings: dict[str, Any]) -> flj.compensation.Compensation:
    """The compensation of the settings of a result."""
    if settings["compensation"] == "independent":
        return flj.compensation.independent(
            scale=settings["scale"],
            first_order=settings["first_order"],
            check_step=settings["first_order"] or "held_out" in settings,
        )
    if settings["compensation"] == "group":
        return flj.compensation.group(
            damping=settings["solve_damping"],
            first_order=settings["first_order"],
            iterations=settings["iterations"],
            fisher=settings.get("fisher", "exact"),
        )
    if settings["first_order"]:  # of the scores alone
        return flj.compensation.independent(scale=0.0, first_order=True, check_step=False)
    return flj.compensation.none()


def selection(settings: dict[str, Any], seed: int) -> flj.selection.Selection | None:
    """The refinement of the masks; None for masks by score alone."""
    if "selection" not in settings:
        return None
    border = settings["border"]
    if settings["selection"] == "swaps":
        return flj.selection.swaps(border=border)
    solver = "swaps" if settings["selection"] == "qubo" else "annealing"
    return flj.selection.qubo(border=border, solver=solver, seed=seed)


def goal(
    target: float | str, spec: Spec, measured_on: Sequence[tuple]
) -> float | flj.targets.Target:
    """The `sparsity=` of `prune_one_shot`, from a number or from text such as `loss:0.05`.

    Args:
        target: the sparsity, or the text.
        spec: the model.
        measured_on: batches on which an accuracy is measured.
    """
    if not isinstance(target, str):
        return target
    name, _, text = target.partition(":")
    number = float(text)
    if name == "weights":
        return flj.targets.weights(int(number))
    if name == "loss":
        return flj.targets.loss_increase(number)
    if name != "accuracy":
        return getattr(flj.targets, name)(number)

    def accuracy(params: Any) -> float:
        return training.accuracy(spec.model, params, measured_on)

    return flj.targets.metric(accuracy, at_most_drop=number)
