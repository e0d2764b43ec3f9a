"""Lowest sparsity that keeps no more than a budget, found by counting with masks alone."""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._checks import arrays
from fishleg_jax.model import BatchLike, Model
from fishleg_jax.pruning.costs import weight_costs
from fishleg_jax.pruning.masks.build import number_to_prune
from fishleg_jax.pruning.one_shot.choice import decide
from fishleg_jax.pruning.one_shot.stage import Goal, Plan, Scored, Step, advance, choose
from fishleg_jax.pruning.schedules import stage_sparsities
from fishleg_jax.pruning.target_types import Budget


def sparsity_of(count: int, weights: int) -> float:
    """Sparsity that prunes exactly `count` of `weights` weights."""
    sparsity = count / weights
    while number_to_prune(sparsity, weights) < count:
        sparsity = math.nextafter(sparsity, 1.0)
    return sparsity


def of_weights(at_most: int, sizes: Sequence[int]) -> float:
    """Lowest sparsity that keeps at most a number of weights.

    Args:
        at_most: Number of weights.
        sizes: Number of weights below each threshold: one for all leaves under the scope `global`,
            one for each leaf otherwise.

    Raises:
        ValueError: More weights are kept at any sparsity.
    """
    total = sum(sizes)

    def fits(count):
        sparsity = sparsity_of(count, total)
        return sum(n - number_to_prune(sparsity, n) for n in sizes) <= at_most

    if at_most < len(sizes):
        raise ValueError(
            f"sparsity: with scope='layer' each of {len(sizes)} leaves keeps at least one weight, "
            f"so the target must be at least weights({len(sizes)}), got weights({at_most})"
        )
    return sparsity_of(bisect.bisect_left(range(total - 1), True, key=fits), total)


def costs_of(
    budget: Budget, model: Model, params: Any, batch: BatchLike, chosen: Sequence[bool], scope: str
) -> Any:
    """Cost of one weight of each leaf in a budget's unit; shapes can stand in for arrays.

    Raises:
        ValueError: Invalid costs; a budget below the cost that remains at any sparsity.
    """
    costs = budget.costs
    if budget.unit == "weights":
        costs = jax.tree.map(lambda _: 1.0, params)
    elif budget.unit == "cost":
        arrays.check_costs(params, costs, chosen, positive=False)
    else:
        costs = weight_costs(model, params, batch, unit=budget.unit)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(costs), chosen, strict=True)
    cheapest = [float(np.min(cost)) for leaf, cost, yes in leaves if yes and leaf.size]
    least = min(cheapest) if scope == "global" else sum(cheapest)
    if budget.at_most < least:
        raise ValueError(
            f"sparsity: the target in {budget.unit} must be at least {least:g}, the least that can "
            f"be kept, got {budget.at_most:g}"
        )
    return costs


def kept_cost(masks: Any, costs: Any, chosen: Sequence[bool]) -> float:
    """Cost of the prunable weights that masks keep."""
    total = 0.0
    for mask, cost, yes in zip(jax.tree.leaves(masks), jax.tree.leaves(costs), chosen, strict=True):
        if yes and np.ndim(cost) == 0:
            total += float(cost) * int(jnp.sum(mask))
        elif yes:
            total += float(np.sum(np.asarray(cost, np.float64), where=np.asarray(mask)))
    return total


def within_budget(
    plan: Plan,
    budget: Budget,
    model: Model,
    params: Any,
    batch: BatchLike,
    stages: int,
    schedule: str,
    initial: float = 0.0,
) -> Goal:
    """Prunes in stages to the lowest sparsity that keeps no more than a budget.

    That sparsity depends on the ranking of the weights: every stage determines it again, and covers
    its part of the remaining way, so that the last one ends at it.

    Raises:
        ValueError: Invalid costs; a budget below the cost that remains at any sparsity.
    """
    groups = plan.surgeon.groups
    chosen, weights = groups.chosen, groups.weights
    costs = costs_of(budget, model, params, batch, chosen, groups.scope)

    def end(scored: Scored, reports: Sequence[dict]) -> Step:
        before = reports[-1]["sparsity"] if reports else initial

        def aim(scored):
            """Final sparsity by these scores, and that of this stage."""
            keeps = lambda sparsity: kept_cost(choose(plan, scored, sparsity), costs, chosen)
            final = _lowest(keeps, budget.at_most, before, weights)
            return final, stage_sparsities(final, left, schedule=schedule, initial=before)[0]

        # Find the final sparsity by the scores of this stage, and go this stage's part of the way.
        left = stages - len(reports)
        final, sparsity = aim(scored)
        chosen_scores = decide(plan, scored, sparsity, reports)
        if chosen_scores is not scored:
            scored = chosen_scores
            final, sparsity = aim(scored)
        point, info = advance(plan, scored, sparsity)
        # Report the cost, and say why the pruning ends elsewhere than requested.
        kept = kept_cost(point.masks, costs, chosen)
        reached, stopped = kept <= budget.at_most, None
        if final == 0:
            stopped = not_needed(budget)
        if left == 1 and not reached:
            stopped = (
                f"the budget of {budget.at_most:g} was not reached: at the highest possible "
                f"sparsity, {sparsity:.6g}, {kept:g} is kept"
            )
        return Step(point, {"sparsity": sparsity, "cost": kept} | info, reached, stopped)

    return end


def not_needed(budget: Budget) -> str:
    """Message for a budget that covers all weights."""
    return (
        "nothing had to be pruned: all prunable weights together are within "
        f"targets.{budget.unit}({budget.at_most:.12g})"
    )


def _lowest(keeps: Callable[[float], float], at_most: float, before: float, weights: int) -> float:
    """Lowest sparsity from `before` on that keeps at most the budget; the highest if none does."""
    first = number_to_prune(before, weights)

    def sparsity(count):
        return max(before, sparsity_of(count, weights))

    candidates = range(first, weights - 1)
    place = bisect.bisect_left(candidates, True, key=lambda n: keeps(sparsity(n)) <= at_most)
    return sparsity(first + place)
