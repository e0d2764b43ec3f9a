"""Inputs of a gradual pruning: the plan fixed beforehand, and the data of each step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._curvature import Curvature
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.compensation._adjustable import Adjustable
from fishleg_jax.pruning.compensation._independent import Compensation
from fishleg_jax.pruning.gradual.counting import (
    Counts,
    ScheduleRequest,
    Sparsity,
    floor_share,
    request_at,
)
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.masks.densities import Scope, exact_counts, traced_counts
from fishleg_jax.pruning.masks.groups import Groups, of_leaves
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.masks.targets import target_of
from fishleg_jax.pruning.scores import Saliency


class GradualPlan(NamedTuple):
    """Choices that all steps share, from the arguments of `gradual_prune`."""

    estimator: InverseFisher
    sparsity: Sparsity
    compensation: Compensation
    scope: Scope
    aux_every: int | jax.Array
    mask_every: int | jax.Array
    renew: int | jax.Array | None
    regrow: float | jax.Array | Callable | None
    saliency: Saliency = "obs"
    pattern: Pattern | None = None


class StepInputs(NamedTuple):
    """Inputs of one step.

    Attributes:
        step: Number of the step; the first is 1.
        updates: Updates that the optimiser would add to the parameters.
        params: Parameters before the step.
        batch: Batch of the step; None if no curvature is needed.
        curvature: Loss on the batch; None without one.
        assimilate: Whether the batch goes into the estimate; None lets the step count decide.
        emit: False if the step will be discarded.
        hold: Whether the step only holds pruned weights at zero.
        each: Function `(params) -> losses` of this device's examples; None without labels, or if
            nothing is chosen by the loss.
        axis_name: Named axis of devices, each with its own examples; None for one device.
    """

    step: jax.Array
    updates: Any
    params: Any
    batch: Any | None
    curvature: Curvature | None
    assimilate: bool | jax.Array | None
    emit: bool | jax.Array
    hold: bool
    each: Callable[[Any], jax.Array] | None = None
    axis_name: str | None = None


def groups_in(plan: GradualPlan, state: GradualState, params: Any) -> Groups:
    """Leaves that are pruned, as `init` decided them: the keys of `state.weights`."""
    leaves = _tree.named_leaves(params)
    return of_leaves(
        leaves,
        [None if name in state.weights else "not in prunable" for name, _ in leaves],
        [jnp.ndim(state.weights.get(name, 0)) > state.count.ndim for name, _ in leaves],
        *(plan.scope, plan.pattern),
    )


def adjustable_in(state: GradualState, params: Any) -> Adjustable:
    """Leaves that a compensation may move, as `init` decided them."""
    if state.adjustable is None:
        return None
    return tuple(name in state.adjustable for name, _ in _tree.named_leaves(params))


def request_of(
    plan: GradualPlan, groups: Groups, step: jax.Array, state: GradualState
) -> ScheduleRequest:
    """Sparsity and counts that a plan requests at a step; see `request_at`."""
    ahead = (step // plan.mask_every + 1) * plan.mask_every
    sparsity = target_of(groups, plan.sparsity)
    if groups.pattern is None and groups.scope in ("global", "layer"):
        return request_at(sparsity, groups.sizes, step, ahead, state.asked)
    # Share a total among the leaves, or round it to whole groups.
    low = list(state.pruned)

    def traced(value: jax.Array) -> jax.Array:
        plain = jnp.stack([floor_share(value, size) for size in groups.sizes])
        return traced_counts(groups, value, plain, floor_share(value, groups.weights), low)

    counts = Counts(
        lambda s: jnp.stack(list(map(jnp.asarray, exact_counts(groups, s, low)))), traced
    )
    return request_at(sparsity, groups.sizes, step, ahead, state.asked, counts)
