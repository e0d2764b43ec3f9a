"""Choice between scores and dampings, by the loss that a stage would end at."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fishleg_jax import _tree
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import movable_damping, with_damping
from fishleg_jax.pruning import _paired
from fishleg_jax.pruning.one_shot.stage import Plan, Scored, advance, rescored
from fishleg_jax.pruning.scores import label, parsed

DAMPINGS = (0.1, 10.0)  # multiples of the estimate's own damping that are tried
FARTHEST = 1e3  # and how far a winner among them is followed, by the same factors
EVERY = 4  # at least one stage in so many compares all candidates
MARGIN = 1.0  # standard errors of the paired difference by which a winner beats OBS scores


class Candidate(NamedTuple):
    """Scores to try.

    Attributes:
        saliency: Name of the scores.
        factor: Damping relative to the estimate's own.
    """

    saliency: str
    factor: float = 1.0

    def __str__(self) -> str:
        """Name, with the damping if it is not the estimate's own."""
        return label(self.saliency, self.factor)


def candidates(plan: Plan, state: Any) -> list[Candidate]:
    """Scores that an estimate can give: OBS scores first, those which the others have to beat."""
    found = [Candidate("obs"), Candidate("magnitude")]
    if plan.surgeon.estimator.fisher_diagonal is not None:
        found += [Candidate("obd"), Candidate("mixture")]
    if movable_damping(state):
        found += [Candidate("obs", factor) for factor in DAMPINGS]
    return found


def candidates_now(plan: Plan, state: Any, reports: Sequence[dict]) -> list[Candidate]:
    """Candidates of a stage: once the same one has won twice in a row, it and its nearest rivals.

    Those are OBS scores and the best of the others.  At least every fourth stage tries all, as does
    every stage after another winner.

    Args:
        plan: Choices that all stages share.
        state: State of the estimator.
        reports: Reports of earlier stages.
    """
    everyone = candidates(plan, state)
    recent = [report.get("tried", {}) for report in reports[1 - EVERY :]]
    winners = [report.get("saliency") for report in reports[-2:]]
    lately = any(all(str(candidate) in tried for candidate in everyone) for tried in recent)
    if not lately or None in winners or len(set(winners)) == len(winners):
        return everyone
    safe, winner = str(everyone[0]), winners[-1]
    others = {name: loss for name, loss in recent[-1].items() if name not in (safe, winner)}
    rivals = sorted(others, key=others.get)[:1]
    names = dict.fromkeys([safe, winner, *rivals])
    return [Candidate(*parsed(name)) for name in names]


def decide(plan: Plan, scored: Scored, sparsity: float, reports: Sequence[dict] = ()) -> Scored:
    """Chooses scores for a sparsity, if that was left to the measured loss.

    Every candidate is masked and compensated, cheaply where the compensation offers that and on a
    quarter of the stage's batches.  Losses on held-out examples are compared in pairs: of the
    candidates that are better than OBS scores by one standard error of the difference, the one with
    the lowest mean wins; OBS scores, if there is none.  While another damping is the best so far,
    the next one in its direction is a candidate too.  Where a winner repeats, only its nearest
    rivals are tried; see `candidates_now`.

    Args:
        plan: Choices that all stages share.
        scored: Point with OBS scores.
        sparsity: Fraction of the prunable weights that is pruned afterwards.
        reports: Reports of earlier stages.

    Returns:
        The point with the scores of the winner; its `choice` names it, with the mean held-out
        losses of those that were tried.  The same point if there is nothing to choose or measure.
    """
    curvature = scored.curvature
    each = curvature.each
    if plan.surgeon.saliency != "auto" or each is None or plan.surgeon.estimator.updates == 0:
        return scored
    cheap = cheaper(plan)
    best = first_losses = winner = None
    lowest, tried = math.inf, {}
    waiting = candidates_now(plan, scored.fitted, reports)
    for candidate in waiting:
        try:
            state = scored.fitted
            if candidate.factor != 1:
                state = with_damping(state, state.damping * candidate.factor)
            trial = rescored(cheap, in_part(scored), candidate.saliency, state)
            losses = each(_tree.widen(advance(cheap, trial, sparsity)[0].params))
            mean = float(jitted(_paired.mean_and_error)(losses)[0])
        except FloatingPointError:  # no candidate at these weights
            mean = math.inf
        mean = mean if math.isfinite(mean) else math.inf
        tried[str(candidate)] = mean
        if mean == math.inf:
            continue
        if best is None:
            first_losses = losses
        elif mean >= lowest or not jitted(_paired.better, MARGIN)(losses, first_losses):
            continue
        best, lowest, winner = trial, mean, candidate
        known = set(map(str, waiting))
        waiting += [further for further in beyond(candidate) if str(further) not in known]
    if best is None:
        return scored
    choice = {"saliency": str(winner), "tried": tried}
    return best._replace(curvature=curvature, choice=choice)


def beyond(candidate: Candidate) -> list[Candidate]:
    """The next damping in the direction of one that has won; none for the estimate's own."""
    step = DAMPINGS[0] if candidate.factor < 1 else DAMPINGS[1]
    far = candidate.factor * step
    within = candidate.factor != 1 and 1 / FARTHEST <= far <= FARTHEST
    return [candidate._replace(factor=far)] if within else []


def in_part(scored: Scored) -> Scored:
    """The point with the curvature on a part of the stage's data, if there is one."""
    return scored._replace(curvature=scored.curvature.part or scored.curvature)


def cheaper(plan: Plan) -> Plan:
    """The plan with the cheap form of its compensation, and without refined masks."""
    compensation = plan.surgeon.compensation
    compensation = getattr(compensation, "cheap", compensation)
    return plan._replace(surgeon=plan.surgeon._replace(compensation=compensation), selection=None)
