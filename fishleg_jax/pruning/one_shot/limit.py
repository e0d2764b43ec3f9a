"""Highest sparsity that loses no more than a limit, found by trying it with the fitted inverse."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fishleg_jax import _tree
from fishleg_jax.pruning.masks.build import number_to_prune
from fishleg_jax.pruning.one_shot.budget import sparsity_of
from fishleg_jax.pruning.one_shot.choice import decide
from fishleg_jax.pruning.one_shot.stage import Goal, Plan, Point, Scored, Step, advance
from fishleg_jax.pruning.target_types import Limit

# (point, report of the stage that led there, reports of earlier stages) -> loss increase
Lost = Callable[[Point, dict, Sequence[dict]], float]


def _what_is_lost(limit: Limit, loss: Callable[[Any], Any] | None, params: Any) -> Lost:
    """Function that measures how much of a limit is used up, counted from the initial weights."""
    if limit.unit == "predicted":
        return lambda point, info, reports: sum(x["predicted"] for x in (*reports, info))
    measure = limit.metric
    if limit.unit == "measured":
        if loss is None:
            raise ValueError(
                "sparsity: loss_increase needs labels to measure the loss, got targets of None; "
                "pass labelled held_out batches, or measured=False"
            )
        measure = lambda weights: -loss(_tree.widen(weights))
    dense = _number(measure(params))
    if not math.isfinite(dense):
        name = "function" if limit.unit == "metric" else "loss"
        raise ValueError(
            f"sparsity: the target's {name} must be a finite number for the initial weights, got "
            f"{dense}"
        )
    return lambda point, info, reports: dense - _number(measure(point.params))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"sparsity: the target's function must return a number, got {type(value).__name__}"
        ) from None


def within_limit(
    plan: Plan,
    limit: Limit,
    params: Any,
    loss: Callable[[Any], Any] | None,
    sparsities: Sequence[float],
    before: int = 0,
) -> Goal:
    """Prunes in stages until one exceeds a limit, then bisects that stage with its fitted inverse.

    Args:
        plan: Choices that all stages share.
        limit: Highest loss increase or drop of a metric.
        params: Initial weights.
        loss: Function of the weights, for a limit in measured nats.
        sparsities: Sparsities of the stages, up to the highest.
        before: Number of weights that the initial masks prune.

    Raises:
        ValueError: The measure is not a finite number for the initial weights.
    """
    weights = plan.surgeon.groups.weights
    lost = _what_is_lost(limit, loss, params)
    counts = [before, *(number_to_prune(s, weights) for s in sparsities)]
    nearest = max(1, math.floor(limit.resolution * weights))

    def end(scored: Scored, reports: Sequence[dict]) -> Step:
        errors, tried = [], []

        def moved(count):
            """Step to a number of pruned weights; None if it exceeds the limit."""
            sparsity = sparsity_of(count, weights)
            try:
                point, info = advance(plan, scored, sparsity)
                loses = lost(point, info, reports)
                if not math.isfinite(loses):
                    raise FloatingPointError(
                        f"the target's measure is not finite at a sparsity of {sparsity:.6g}"
                    )
            except FloatingPointError as error:
                errors.append(error)
                return None
            tried.append((sparsity, loses))
            if loses > limit.at_most:
                return None
            return Step(point, {"sparsity": sparsity, "lost": loses} | info)

        # Try the whole stage first, by the scores that are best for it.
        low, high = counts[len(reports) : len(reports) + 2]
        scored = decide(plan, scored, sparsity_of(high, weights), reports)
        move = moved(high)
        if move is not None:
            return move if high < counts[-1] else move._replace(last=True, stopped=_all(limit))
        # Bisect between the stage before and this one.
        while high - low > nearest:
            middle = (low + high) // 2
            trial = moved(middle)
            if trial is None:
                high = middle
            else:
                low, move = middle, trial
        # End at the highest sparsity within the limit, or at the point before.
        if not tried:  # no sparsity gave a finite result
            raise errors[0]
        if move is not None:
            return move._replace(last=True)
        stopped = None if reports else _none(limit, *tried[-1])
        return Step(scored.point, None, last=True, stopped=stopped)

    return end


def _all(limit: Limit) -> str:
    return (
        f"the limit of {limit.at_most:g} was not reached at a sparsity of {limit.highest:g}, the "
        "highest allowed; increase `highest` of the target to go on"
    )


def _none(limit: Limit, sparsity: float, lost: float) -> str:
    return (
        f"nothing was pruned, because even a sparsity of {sparsity:.6g} loses {lost:g}, above the "
        f"limit of {limit.at_most:g}"
    )
