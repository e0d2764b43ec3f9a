"""Stages that choose themselves: each as long as the quadratic model can be trusted."""

import math
from collections.abc import Sequence
from typing import Any

from fishleg_jax import _tree
from fishleg_jax._jit import jitted
from fishleg_jax.pruning import _paired
from fishleg_jax.pruning.one_shot.choice import cheaper, decide, in_part
from fishleg_jax.pruning.one_shot.stage import Goal, Plan, Scored, Step, advance, rescored
from fishleg_jax.pruning.scores import parsed

TRUST = 0.5  # error of the predicted rise of the loss that is allowed, relative to the prediction
NOISE = 0.1  # error that is allowed besides, in standard errors of the held-out loss
RISE = 0.05  # rise of the loss that a stage may bring, in standard deviations over examples
TRIALS = 4  # lengths that are tried at the start of a stage
SHRINK, GROW = 0.2, 2.0  # bounds on the ratio of successive lengths
SAFETY = 0.9  # of the length that would use up the allowed error


def by_steps(plan: Plan, final: float, most: int, initial: float = 0.0) -> Goal:
    """Prunes to a sparsity in stages whose lengths are chosen like the steps of an integrator.

    A stage's length is the fall of the logarithm of the density.  The first one tries the whole
    way.  A length is cut while the measured rise of the loss, after a cheap compensation, exceeds
    the predicted one by more than a half and a tenth of the standard error of the held-out loss, or
    exceeds a twentieth of the standard deviation of the losses of single examples: even where the
    model is exact, scores of single weights hold only for few of them at a time.  Lengths change
    with the square root of the allowed over the found, and the next stage starts from this one's.

    Args:
        plan: Choices that all stages share.
        final: Sparsity to end at.
        most: Largest number of stages; lengths are never below an equal share of what is left.
        initial: Sparsity of the initial masks.
    """

    def end(scored: Scored, reports: Sequence[dict]) -> Step:
        before = reports[-1]["sparsity"] if reports else initial
        way = math.log1p(-before) - math.log1p(-final)
        least, length = way / (most - len(reports)), way
        if reports:
            start = reports[-2]["sparsity"] if len(reports) > 1 else initial
            length = math.log1p(-start) - math.log1p(-before)
            length = min(max(length * reports[-1]["growth"], least), way)
        noise, rise = _scale(scored)

        if way < 2 * length < 2 * way:  # two equal stages rather than a long and a short one
            length = max(way / 2, least)

        # Cut the length while the quadratic model fails.
        trial, cheap = in_part(scored), cheaper(plan)
        if reports and "saliency" in reports[-1]:
            trial = _as_before(cheap, trial, reports[-1]["saliency"])
        for _ in range(TRIALS):
            if length <= least * (1 + 1e-9):
                break
            try:
                _, info = advance(cheap, trial, _sparsity(before, length, way, final))
                growth = growth_of(info, noise, rise)
            except FloatingPointError:
                growth = SHRINK
            if growth >= SAFETY:
                break
            length = max(length * growth, least)

        # Choose the scores for this length, and prune.
        sparsity = _sparsity(before, length, way, final)
        point, info = advance(plan, decide(plan, scored, sparsity, reports), sparsity)
        info |= {"growth": growth_of(info, noise, rise)}
        return Step(point, {"sparsity": sparsity} | info, last=sparsity == final)

    return end


def growth_of(info: dict[str, Any], noise: float, rise: float) -> float:
    """Length of the next stage over this one's, from the predicted and the actual rise of the loss.

    Args:
        info: Numbers that a compensation reports.
        noise: Error that is allowed beside a share of the prediction, in nats.
        rise: Rise of the loss that is allowed, in nats.
    """
    predicted, actual = info.get("predicted", math.nan), info.get("actual", math.nan)
    if not math.isfinite(predicted) or not math.isfinite(actual):
        return SHRINK
    growth = GROW
    allowed = TRUST * max(predicted, 0.0) + noise
    for found, limit in ((actual - predicted, allowed), (actual, rise + noise)):
        if found > 0:
            growth = min(growth, SAFETY * math.sqrt(limit / found))
    return max(growth, SHRINK)


def _sparsity(before: float, length: float, way: float, final: float) -> float:
    if length >= way * (1 - 1e-9):
        return final
    return 1 - (1 - before) * math.exp(-length)


def _scale(scored: Scored) -> tuple[float, float]:
    """Noise and allowed rise of the loss; no noise and any rise without held-out data."""
    each = scored.curvature.each
    if each is None:
        return 0.0, math.inf
    losses = each(_tree.widen(scored.point.params))
    error = float(jitted(_paired.mean_and_error)(losses)[1])
    return NOISE * error, RISE * error * math.sqrt(sum(x.size for x in losses))


def _as_before(plan: Plan, scored: Scored, saliency: str) -> Scored:
    """The point with the scores that won in the stage before, at the estimate's own damping."""
    return rescored(plan, scored, parsed(saliency)[0], scored.fitted)
