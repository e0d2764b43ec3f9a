"""Which pruned weights come back: those whose return promises the largest fall of the loss."""

from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax.fisher import Curvature
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.masks import _keep


def revived(
    estimator: InverseFisher,
    estimate: Any,
    params: Any,
    curvature: Curvature | None,
    masks: Any,
    groups: list[list[int]],
    counts: list[jax.Array],
    pruned: list[jax.Array],
    share: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """The pruned weights that come back at a mask update.

    A weight that is free to move again lowers the quadratic model by `½ g² [F⁻¹]_ii`, in the units
    of the OBS score.  The inverse is that of the whole matrix, since to the mask's these weights do
    not belong.

    Args:
        estimator: the inverse Fisher.
        estimate: its state.
        params: the weights, pruned ones 0.
        curvature: whose gradient is g.
        masks: of before.
        groups: leaves that share a threshold.
        counts: how many of each group will be pruned.
        pruned: how many of each group are.
        share: of those pruned, how many come back.

    Returns:
        For every leaf which come back, and whether all numbers were finite.

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
    gains = [
        g**2 * q / 2
        for g, q in zip(jax.tree.leaves(gradient), jax.tree.leaves(diagonal), strict=True)
    ]
    kept = jax.tree.leaves(masks)
    backs = [jnp.zeros_like(m) for m in kept]
    sound = jnp.array(True)
    for group, count, before in zip(groups, counts, pruned, strict=True):
        candidates = [~kept[i] & (gains[i] > 0) for i in group]
        weights = sum(m.size for m in candidates)
        possible = sum(jnp.sum(c, dtype=jnp.int32) for c in candidates)
        wanted = jnp.floor(share * before).astype(jnp.int32)
        # as many have to go for them, beyond those that go anyway
        room = weights - jnp.maximum(count, before)
        number = jnp.minimum(jnp.minimum(wanted, possible), room)
        best = _keep([gains[i] for i in group], candidates, weights - number)
        for i, back in zip(group, best, strict=True):
            backs[i] = back
        sound &= jnp.stack([jnp.all(jnp.isfinite(gains[i]) | kept[i]) for i in group]).all()
    return backs, sound
