"""Regrowth: pruned weights come back where that predicts the largest fall of the loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._curvature import Curvature
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.gradual.counting import FAR
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.masks.lowest import keep_highest

Regrow = float | jax.Array | Callable[[jax.Array], Any]


def share_at(regrow: Regrow | None, step: Any) -> jax.Array | None:
    """Share of the pruned weights that comes back at a mask update; None without regrowth.

    NaN for a share outside [0, 1].
    """
    if regrow is None:
        return None
    share = jnp.asarray(regrow(step) if callable(regrow) else regrow, jnp.float32)
    return jnp.where((share >= 0) & (share <= 1), share, jnp.nan)


def more_to_come(regrow: Regrow | None, share: jax.Array | None) -> jax.Array:
    """Whether weights may come back although the sparsity no longer rises."""
    if not callable(regrow):
        return jnp.array(False)
    return (share > 0) | (share_at(regrow, jnp.asarray(FAR)) > 0)


def revived(
    estimator: InverseFisher,
    estimate: Any,
    params: Any,
    curvature: Curvature | None,
    masks: Any,
    groups: Groups,
    pruned: jax.Array,
    share: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Finds the pruned weights that may come back at a mask update.

    A weight that is free to move again lowers the quadratic model by `½ g² [F⁻¹]_ii`, in the units
    of the OBS score, so it compares with the loss increase if another weight is pruned instead.
    The inverse is that of the whole matrix, since the mask's does not contain these weights.

    Args:
        estimator: Estimate of the inverse Fisher.
        estimate: State of the estimator.
        params: Weights, pruned ones 0.
        curvature: Loss whose gradient is g.
        masks: Masks before.
        groups: Leaves that are pruned, and weights that share a threshold.
        pruned: Number of pruned weights of each group, of shape (groups,).
        share: Largest share of these that may come back, in [0, 1].

    Returns:
        For every leaf the weights that may come back, and the fall of the loss for each weight.

    Raises:
        ValueError: A missing curvature.
    """
    if curvature is None:
        raise ValueError(
            "regrow needs the gradient: pass it to update(..., grad=grad), or pass a model and "
            "labelled batches"
        )
    gradient = _tree.widen(curvature.gradient(params))
    diagonal = estimator.diagonal(estimate, params)
    gains = jax.tree.leaves(jax.tree.map(lambda g, q: g**2 * q / 2, gradient, diagonal))
    kept = jax.tree.leaves(masks)
    number = jnp.floor(share * pruned).astype(jnp.int32)
    sizes = jnp.asarray(groups.sizes, jnp.int32)
    best = keep_highest(groups, gains, [~m for m in kept], sizes - number)
    pairs = zip(best, kept, groups.chosen, strict=True)
    return [back if yes else jnp.zeros_like(m) for back, m, yes in pairs], gains
