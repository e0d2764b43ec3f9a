"""What all selections share: the weights that are free, found before anything is chosen."""

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
    """The free weights, and all that may be asked about them.

    Attributes:
        edge: which they are.
        groups: for each a whole number; weights of equal ones may be swapped.
        params: the weights of the model, in float32 or better.
        target: the weights that have the scores for their OBS scores, see `heading`.
        old_masks: the masks before.
        gone: what is newly pruned and not free.
        curvature: the loss around `params`; None where nobody needs it.
        estimator: the inverse Fisher.
        state: its state.
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
    curvature_for: str | None = None,
) -> Selection:
    """A selection of which only the choice among the weights nearest to the threshold is left.

    Args:
        border: how many weights are free, half of them on either side of the threshold.
        choose: which of the free ones are pruned, booleans; as many as before in every group.
        curvature_for: what the curvature is needed for, in words; None where it is not.

    Raises:
        ValueError: a border of fewer than two weights.
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
        if first_order and curvature is None:
            raise ValueError("curvature is needed for the gradient")
        params = _tree.widen(params)
        edge = find_border(old_masks, new_masks, scores, border // 2, scope)
        if not two_sided(edge):
            return new_masks
        gradient = curvature.gradient(params) if first_order else None
        target = jitted(heading, estimator)(state, params, old_masks, scores, gradient)
        gone = jitted(lost_beyond)(old_masks, new_masks, edge.leaves, edge.places)
        groups = swap_groups(edge, scope)
        pruned = choose(
            Free(edge, groups, params, target, old_masks, gone, curvature, estimator, state)
        )
        return jitted(moved)(new_masks, edge.leaves, edge.places, pruned)

    return select
