"""Translates the sparsity or target of `prune_one_shot` into stages."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fishleg_jax import _text
from fishleg_jax.model import BatchLike, Model
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.one_shot import budget, limit
from fishleg_jax.pruning.one_shot.choice import decide
from fishleg_jax.pruning.one_shot.stage import Goal, Plan, Scored, Step, advance
from fishleg_jax.pruning.schedules import stage_sparsities
from fishleg_jax.pruning.target_types import Budget, Limit, Target


def sparsity_or_target(asked: float | Target, groups: Groups) -> float | Target:
    """Converts a number of weights to its sparsity; returns everything else as it came."""
    if isinstance(asked, Budget) and asked.unit in ("seconds", "time_share"):
        raise ValueError(
            f"sparsity: zeros alone save no time, so targets.{asked.unit} is for flj.choose_units, "
            "which prunes whole units; use targets.flops or another target"
        )
    if not isinstance(asked, Budget) or asked.unit != "weights":
        return asked
    if groups.pattern is not None or groups.scope not in ("global", "layer"):
        return asked  # found by counting, since whole groups go
    return budget.of_weights(asked.at_most, groups.sizes)


def planned(
    goal: float | Target, stages: int, schedule: str | Sequence[float], initial: float = 0.0
) -> list[float]:
    """Sparsities of all stages, as far as they are known beforehand; not at all for a budget.

    They start from an initial sparsity, that of the initial masks.
    """
    if isinstance(schedule, Iterable) and not isinstance(schedule, str):
        return _given(goal, stages, schedule)
    final = goal
    if isinstance(goal, (Budget, Limit)):
        final = goal.highest if isinstance(goal, Limit) else initial
    (final,) = stage_sparsities(final, 1)  # checks it
    return stage_sparsities(final, stages, schedule=schedule, initial=min(initial, final))


def _given(goal: float | Target, stages: int, schedule: Sequence[float]) -> list[float]:
    """Checks and returns a schedule that is given stage by stage."""
    if isinstance(goal, (Budget, Limit)):
        raise ValueError("schedule must be a name if sparsity is a target, got sparsities")
    final = stage_sparsities(goal, stages)[-1]  # checks both
    sparsities = []
    for sparsity in schedule:
        try:
            sparsities += stage_sparsities(sparsity, 1)
        except ValueError:
            raise ValueError(
                f"schedule must contain numbers in [0, 1), got {_text.shown(sparsity)}"
            ) from None
    if len(sparsities) != stages or sparsities != sorted(sparsities) or sparsities[-1] != final:
        raise ValueError(
            f"schedule must be a name, or {stages} increasing sparsities, one for each stage, "
            f"ending at sparsity={final:g}, got {sparsities}"
        )
    return sparsities


def goal_for(
    asked: float | Target,
    goal: float | Target,
    plan: Plan,
    model: Model,
    params: Any,
    batch: BatchLike,
    loss: Callable[[Any], Any] | None,
    sparsities: Sequence[float],
    schedule: str,
    before: int = 0,
) -> Goal:
    """Returns the function that ends each stage on the way to a goal.

    Args:
        asked: Sparsity or target that the user passed.
        goal: The same as a sparsity, or a target that depends on the ranking or on the loss.
        plan: Choices that all stages share.
        model: Model, to count operations.
        params: Initial weights.
        batch: Batch, to count operations.
        loss: Function of the weights, for a measured limit; None without labels.
        sparsities: Planned sparsities of the stages.
        schedule: Growth of the sparsity from stage to stage.
        before: Number of weights that the initial masks prune.

    Raises:
        ValueError: The goal is known to be unreachable before any stage.
    """
    if isinstance(goal, Budget):
        initial = budget.sparsity_of(before, plan.surgeon.groups.weights)
        return budget.within_budget(
            plan, goal, model, params, batch, len(sparsities), schedule, initial
        )
    if isinstance(goal, Limit):
        return limit.within_limit(plan, goal, params, loss, sparsities, before)
    scheduled = by_schedule(plan, sparsities)
    if isinstance(asked, Budget) and goal == 0:
        return lambda *args: scheduled(*args)._replace(stopped=budget.not_needed(asked))
    return scheduled


def by_schedule(plan: Plan, sparsities: Sequence[float]) -> Goal:
    """Ends each stage at a sparsity that is known beforehand."""

    def end(scored: Scored, reports: Sequence[dict]) -> Step:
        sparsity = sparsities[len(reports)]
        point, info = advance(plan, decide(plan, scored, sparsity, reports), sparsity)
        return Step(point, {"sparsity": sparsity} | info)

    return end
