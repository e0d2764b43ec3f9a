"""Which pruned weights come back: those whose return promises the largest fall of the loss."""

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
    """Which share of the pruned weights comes back at a mask update; None for no such thing.

    NaN where it is none in [0, 1].
    """
    if regrow is None:
        return None
    share = jnp.asarray(regrow(step) if callable(regrow) else regrow, jnp.float32)
    return jnp.where((share >= 0) & (share <= 1), share, jnp.nan)


def more_to_come(regrow: Regrow | None, share: jax.Array | None) -> jax.Array:
    """Whether weights may come back though the sparsity rises no more."""
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
    """The pruned weights that may come back at a mask update.

    A weight that is free to move again lowers the quadratic model by `½ g² [F⁻¹]_ii`, in the units
    of the OBS score: it can be compared with what the loss rises by where another goes for it.  The
    inverse is that of the whole matrix, since to the mask's these weights do not belong.

    Args:
        estimator: the inverse Fisher.
        estimate: its state.
        params: the weights, pruned ones 0.
        curvature: whose gradient is g.
        masks: of before.
        groups: Which leaves are pruned, and which weights share a threshold.
        pruned: how many of each group are, of shape (groups,).
        share: of those pruned, how many may come back at most.

    Returns:
        For every leaf which may come back, and what the loss falls by for each weight.

    Raises:
        ValueError: no curvature.
    """
    if curvature is None:
        raise ValueError(
            "regrow needs the gradient: hand it in, update(..., grad=grad), or give a model and a "
            "labelled batch"
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
