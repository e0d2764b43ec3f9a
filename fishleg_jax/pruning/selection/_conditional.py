"""Weights and inverse Fisher on a border, once other weights are pruned and compensated."""

from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax._conjugate_gradients import conjugate_gradients
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.selection._border import gather, scatter


def heading(
    estimator: InverseFisher, state: Any, params: Any, masks: Any, scores: Any, gradient: Any | None
) -> Any:
    """Weights whose OBS scores are the given scores: `u² / (2 [F⁻¹]_ii) = score`.

    These are the weights themselves, `w − F⁻¹g` with a gradient, and with costs these divided by
    the roots of the costs.
    """
    towards = params
    if gradient is not None:
        step = estimator.multiply(state, gradient, masks)
        towards = jax.tree.map(jnp.subtract, params, step)
    diagonal = estimator.diagonal(state, params, masks)

    def one(w, q, score, mask):
        ranked = mask & jnp.isfinite(score)
        size = jnp.sqrt(2 * jnp.where(ranked, q * score, 0))
        return jnp.sign(w) * size

    return jax.tree.map(one, towards, diagonal, scores, masks)


def conditional(
    estimator: InverseFisher,
    at_once: int,
    state: Any,
    target: Any,
    old_masks: Any,
    gone: Any,
    leaves: jax.Array,
    places: jax.Array,
    iterations: jax.Array,
    tolerance: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Weights and inverse Fisher on the border, once the other weights are pruned and compensated.

    With Q the inverse Fisher and S the other weights, the border's B weights become
    `w_B − Q_BS (Q_SS)⁻¹ w_S` and their inverse Fisher `Q_BB − Q_BS (Q_SS)⁻¹ Q_SB`, which is
    `((F_KK)⁻¹)_BB` with K all but S.  `multiply` cut to S is `Q_SS` itself, so that conjugate
    gradients solve with it, and the inverse need not be fitted to the smaller K.

    Args:
        estimator: Estimate of the inverse Fisher.
        at_once: Number of the n columns processed at a time; memory grows with it.
        state: State of the estimator.
        target: w, a pytree.
        old_masks: Masks that the estimator was fitted to.
        gone: S, a pytree of booleans.
        leaves: Leaf of each border weight, see `Border`.
        places: Position of each border weight in its leaf.
        iterations: Largest number of iterations of a solve.
        tolerance: Residual at which a solve ends, relative to its right side.

    Returns:
        The weights, shape (n,), and the inverse Fisher, shape (n, n).
    """
    state = prepared(estimator, state, target)
    q = estimator.diagonal(state, target, old_masks)
    # weights outside S do not enter the solve, whatever their scale
    scale = jax.tree.map(lambda d, m: jnp.where(m, 1 / jnp.where(m, d, 1), 0), q, gone)

    def solve(right):
        right = apply_mask(right, gone)
        zero = jax.tree.map(jnp.zeros_like, right)
        product = lambda v: estimator.multiply(state, v, gone)
        return conjugate_gradients(
            product, _times, (scale,), right, zero, iterations=iterations, tolerance=tolerance
        ).x

    def column(unit):
        e = scatter(target, leaves, places, unit)
        held = solve(estimator.multiply(state, e, old_masks))
        left = jax.tree.map(jnp.subtract, e, held)
        return gather(estimator.multiply(state, left, old_masks), leaves, places)

    left = jax.tree.map(jnp.subtract, target, estimator.multiply(state, solve(target), old_masks))
    weights = gather(left, leaves, places)
    units = jnp.eye(len(leaves), dtype=weights.dtype)
    columns = jax.lax.map(column, units, batch_size=at_once)
    return weights, (columns + columns.T) / 2


def _times(scale: Any, vector: Any) -> Any:
    return jax.tree.map(jnp.multiply, scale, vector)
