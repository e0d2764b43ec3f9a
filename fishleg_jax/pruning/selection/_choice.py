"""Steps that all selections share: find the free weights before anything is chosen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._checks.numbers import check_count
from fishleg_jax._curvature import Curvature
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.selection._border import (
    Border,
    Selection,
    find_border,
    lost_beyond,
    moved,
    swap_groups,
    two_sided,
)
from fishleg_jax.pruning.selection._conditional import heading


class Free(NamedTuple):
    """Free weights, and everything that a choice among them may need.

    Attributes:
        edge: The free weights.
        groups: Whole number for each; weights with equal numbers may be swapped.
        params: Weights of the model, in float32 or better.
        target: Weights whose OBS scores are the given scores, see `heading`.
        old_masks: Masks before.
        gone: Weights that are newly pruned and not free.
        curvature: Loss around `params`; None if it is not needed.
        estimator: Estimate of the inverse Fisher.
        state: State of the estimator.
    """

    edge: Border
    groups: np.ndarray
    params: Any
    target: Any
    old_masks: Any
    gone: Any
    curvature: Curvature | None
    estimator: InverseFisher
    state: Any


def choosing(
    border: int,
    choose: Callable[[Free], jax.Array],
    *,
    with_gradient: bool = False,
    curvature_for: str | None = None,
) -> Selection:
    """Builds a selection from a choice among the weights nearest to the threshold.

    Args:
        border: Number of free weights, half of them on either side of the threshold.
        choose: Function from `Free` to booleans, True for the free weights to prune; as many as
            before in every group.
        with_gradient: Whether the gradient takes part if the scores take it into account.
        curvature_for: Purpose of the curvature, in words; None if it is not needed.

    Raises:
        ValueError: A border of fewer than two weights.
    """
    border = check_count(border, "border", least=2)

    def select(
        params: Any,
        old_masks: Any,
        new_masks: Any,
        scores: Any,
        curvature: Curvature | None,
        estimator: InverseFisher,
        state: Any,
        scope: str = "global",
        first_order: bool = False,
    ) -> Any:
        if curvature_for is not None and curvature is None:
            raise ValueError(f"curvature is needed for {curvature_for}")
        if with_gradient and first_order and curvature is None:
            raise ValueError("curvature is needed for the gradient")
        params = _tree.widen(params)
        # Find the free weights; a one-sided border leaves nothing to swap.
        edge = find_border(old_masks, new_masks, scores, border // 2, scope)
        if not two_sided(edge):
            return new_masks
        # Weights and scores as the choice needs them.
        with_it = with_gradient and first_order
        gradient = curvature.gradient(params) if with_it else None
        target = jitted(heading, estimator)(state, params, old_masks, scores, gradient)
        gone = jitted(lost_beyond)(old_masks, new_masks, edge.leaves, edge.places)
        groups = swap_groups(edge, scope)
        pruned = choose(
            Free(edge, groups, params, target, old_masks, gone, curvature, estimator, state)
        )
        return jitted(moved)(new_masks, edge.leaves, edge.places, pruned)

    return select
