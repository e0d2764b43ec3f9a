"""What a gradual pruning is told beforehand, and what it sees at a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fishleg_jax import _tree
from fishleg_jax.fisher import Curvature
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning._counting import Asked, Sparsity, asked_at
from fishleg_jax.pruning._independent import Compensation


class GradualPlan(NamedTuple):
    """What all steps have in common; see `gradual_prune`."""

    estimator: InverseFisher
    sparsity: Sparsity
    compensation: Compensation
    prunable: _tree.Selection
    scope: str
    aux_every: int | jax.Array
    mask_every: int | jax.Array
    renew: int | jax.Array | None
    regrow: float | jax.Array | Callable | None


class Seen(NamedTuple):
    """What a step sees.

    Attributes:
        step: its number; the first is 1.
        updates: what the optimiser would add to the parameters.
        params: the parameters before.
        batch: None where no curvature is looked at.
        curvature: the loss on the batch, None without one.
        assimilate: whether the batch goes into the estimate; None where the counter decides.
        emit: False where the step is going to be thrown away.
        hold: whether nothing is done but to hold what is pruned.
    """

    step: jax.Array
    updates: Any
    params: Any
    batch: Any | None
    curvature: Curvature | None
    assimilate: bool | jax.Array | None
    emit: bool | jax.Array
    hold: bool


def groups_of(params: Any, prunable: _tree.Selection, scope: str) -> list[list[int]]:
    """The leaves, by their numbers, that share a threshold."""
    chosen = [i for i, yes in enumerate(_tree.select(params, prunable, "prunable")) if yes]
    return [[i] for i in chosen] if scope == "layer" else [chosen]


def group_sizes(params: Any, groups: list[list[int]]) -> list[int]:
    """How many weights every group has."""
    leaves = jax.tree.leaves(params)
    return [sum(leaves[i].size for i in group) for group in groups]


def asked_of(plan: GradualPlan, params: Any, step: jax.Array, before: jax.Array) -> Asked:
    """What a plan asks for at a step; see `asked_at`."""
    sizes = group_sizes(params, groups_of(params, plan.prunable, plan.scope))
    ahead = (step // plan.mask_every + 1) * plan.mask_every
    return asked_at(plan.sparsity, sizes, step, ahead, before)
