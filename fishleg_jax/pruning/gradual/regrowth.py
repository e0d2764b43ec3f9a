"""Regrowth: pruned weights come back where they promise more than kept ones."""

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


def predicted_falls(
    estimator: InverseFisher, estimate: Any, params: Any, curvature: Curvature | None
) -> list[jax.Array]:
    """Falls of the loss if single weights that are 0 are free to move again.

    That of the quadratic model is `½ g² [F⁻¹]_ii`, in the units of the OBS score, so it compares
    with the loss increase if another weight is pruned instead.  The inverse is that of the whole
    matrix, since the mask's does not contain pruned weights.

    Args:
        estimator: Estimate of the inverse Fisher.
        estimate: State of the estimator.
        params: Weights, pruned ones 0.
        curvature: Loss whose gradient is g.

    Raises:
        ValueError: A missing curvature.
    """
    gradient, diagonal = _gradient_and_diagonal(estimator, estimate, params, curvature)
    return jax.tree.leaves(jax.tree.map(lambda g, q: g**2 * q / 2, gradient, diagonal))


def newton_step(
    estimator: InverseFisher, estimate: Any, params: Any, curvature: Curvature | None
) -> Any:
    """Values that single weights at 0 would take by a Newton step, `−[F⁻¹]_ii g`.

    In the units of weights, so that scores of weights compare with those of kept ones: with OBS
    scores that is the same as `predicted_falls`.

    Args:
        estimator: Estimate of the inverse Fisher.
        estimate: State of the estimator.
        params: Weights, pruned ones 0.
        curvature: Loss whose gradient is g.

    Raises:
        ValueError: A missing curvature.
    """
    gradient, diagonal = _gradient_and_diagonal(estimator, estimate, params, curvature)
    return jax.tree.map(lambda g, q: -q * g, gradient, diagonal)


def may_return(
    groups: Groups,
    gains: list[jax.Array],
    kept: list[jax.Array],
    pruned: jax.Array,
    share: jax.Array,
) -> list[jax.Array]:
    """Masks of the pruned weights that may come back at a mask update: those with most to gain.

    Args:
        groups: Leaves that are pruned, and weights that share a threshold.
        gains: Scores of the pruned weights, an array for every leaf.
        kept: Masks before.
        pruned: Number of pruned weights of each group, of shape (groups,).
        share: Largest share of these that may come back, in [0, 1].
    """
    number = jnp.floor(share * pruned).astype(jnp.int32)
    sizes = jnp.asarray(groups.sizes, jnp.int32)
    best = keep_highest(groups, gains, [~m for m in kept], sizes - number)
    trios = zip(best, kept, groups.chosen, strict=True)
    return [back if yes else jnp.zeros_like(m) for back, m, yes in trios]


def _gradient_and_diagonal(
    estimator: InverseFisher, estimate: Any, params: Any, curvature: Curvature | None
) -> tuple[Any, Any]:
    if curvature is None:
        raise ValueError(
            "regrow needs the gradient: pass it to update(..., grad=grad), or pass a model and "
            "labelled batches"
        )
    return _tree.widen(curvature.gradient(params)), estimator.diagonal(estimate, params)
