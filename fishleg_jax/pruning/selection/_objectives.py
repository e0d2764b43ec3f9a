"""Costs of pruned sets, and the changes of a cost under all swaps of two weights at once.

A set is a vector of booleans, True for pruned.  An objective is four functions of arrays, so that
one search serves them all, and the arrays go through `jit` as data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Objective(NamedTuple):
    """Cost of sets with cheap changes under swaps.

    Attributes:
        cost: `(*arrays, pruned) -> scalar`, computed from scratch.
        begin: `(*arrays, pruned) -> state`, which is kept up to date from swap to swap.
        changes: `(state) -> (n, n)`: entry `[i, j]` is the change of the cost if i is kept and j
            pruned in its place.  Only entries of a pruned i and a kept j are valid.
        exchange: `(state, i, j) -> state` after that swap.
    """

    cost: Callable[..., jax.Array]
    begin: Callable[..., Any]
    changes: Callable[..., jax.Array]
    exchange: Callable[..., Any]


def compensated_cost(weights: jax.Array, inverse: jax.Array, pruned: jax.Array) -> jax.Array:
    """Loss of pruning weights together when the others make up for it: `½ w_Sᵀ(P_SS)⁻¹w_S`.

    Args:
        weights: w, shape (n,).
        inverse: P, the inverse of the damped Fisher on these weights, shape (n, n), symmetric and
            positive definite.
        pruned: S, booleans of shape (n,).

    Returns:
        A scalar of the weights' dtype, in nats per example; NaN where P is not positive definite.

    Raises:
        ValueError: Mismatched shapes, or an empty array.

    References:
        Hassibi & Stork, Second order derivatives for network pruning, 1993, equation 5, for a set;
        Yu et al., The combinatorial brain surgeon, ICML 2022, the problem before it is taken apart.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> inverse = jnp.linalg.inv(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> both, one = jnp.array([True, True]), jnp.array([True, False])
        >>> print(f"{flj.selection.compensated_cost(jnp.ones(2), inverse, both):.2f}")
        3.00
        >>> print(f"{flj.selection.compensated_cost(jnp.ones(2), inverse, one):.2f}")
        0.75
    """
    weights, inverse, pruned = as_floats(weights), as_floats(inverse), jnp.asarray(pruned)
    _check(weights, inverse, pruned, "weights", "inverse")
    block = jnp.where(jnp.outer(pruned, pruned), inverse, jnp.eye(len(pruned), dtype=inverse.dtype))
    gone = jnp.where(pruned, weights, 0)
    root = jnp.linalg.cholesky(block)
    # as a sum of squares it can't be negative
    return jnp.sum(jax.scipy.linalg.solve_triangular(root, gone, lower=True) ** 2) / 2


def qubo_cost(linear: jax.Array, quadratic: jax.Array, pruned: jax.Array) -> jax.Array:
    """Quadratic form `Σ_i c_i x_i + ½ Σ_ij x_i H_ij x_j` of a set.

    With `H_ij = w_i F_ij w_j` it is the loss of pruning weights together without compensation; c is
    their interaction with weights that are already pruned, `w_i Σ_j F_ij w_j`.

    Args:
        linear: c, shape (n,).
        quadratic: H, shape (n, n), symmetric.
        pruned: x, booleans of shape (n,).

    Returns:
        A scalar of the arrays' dtype, in nats per example.

    Raises:
        ValueError: Mismatched shapes, or an empty array.

    References:
        Yu et al., The combinatorial brain surgeon, ICML 2022.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> fisher = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> flj.selection.qubo_cost(jnp.zeros(2), fisher, jnp.array([True, True]))
        Array(3., dtype=float32)
    """
    linear, quadratic, pruned = as_floats(linear), as_floats(quadratic), jnp.asarray(pruned)
    _check(linear, quadratic, pruned, "linear", "quadratic")
    x = jnp.where(pruned, jnp.ones((), quadratic.dtype), 0)
    return x @ linear + x @ (quadratic @ x) / 2


def as_floats(x: Any) -> jax.Array:
    """Converts lists and whole numbers to an array of floating-point numbers."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def _check(vector: Any, matrix: Any, pruned: Any, vector_name: str, matrix_name: str) -> None:
    n = jnp.size(vector)
    if n == 0:
        raise ValueError(f"{vector_name} must have at least one weight, got shape (0,)")
    expected = (
        ("pruned", pruned, (n,)),
        (vector_name, vector, (n,)),
        (matrix_name, matrix, (n, n)),
    )
    for name, array, shape in expected:
        if jnp.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(array)}")
    if pruned.dtype != bool:
        raise ValueError(f"pruned must be booleans, got {pruned.dtype}")


class _Tableau(NamedTuple):
    """Matrix `[[P, w], [wᵀ, 0]]` after a pivot on every pruned weight, like a regression's sweep.

    Attributes:
        matrix: −(P_SS)⁻¹ on the pruned S, P_KK − P_KS(P_SS)⁻¹P_SK on the kept K, and (P_SS)⁻¹P_SK
            between them.
        vector: (P_SS)⁻¹w_S on S, which holds the weights at zero; on K the compensated weights.
    """

    matrix: jax.Array  # shape=(n, n)
    vector: jax.Array  # shape=(n,)


def _compensated_begin(weights: jax.Array, inverse: jax.Array, pruned: jax.Array) -> _Tableau:
    # a unit diagonal changes no cost, and spares float32 the range of the weights
    scale = jax.lax.rsqrt(jnp.diagonal(inverse))
    weights, inverse = scale * weights, scale[:, None] * inverse * scale
    eye = jnp.eye(len(pruned), dtype=inverse.dtype)
    both, neither = jnp.outer(pruned, pruned), jnp.outer(~pruned, ~pruned)
    block = jnp.where(both, inverse, eye)
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(block), True), eye)
    solved = jnp.where(both, solved, 0)
    across = solved @ jnp.where(both, 0, inverse)  # rows of S, columns of K
    between = inverse - jnp.where(pruned[None], inverse, 0) @ across
    matrix = jnp.where(both, -solved, jnp.where(neither, between, across + across.T))
    held = solved @ weights
    free = weights - inverse @ held
    return _Tableau(matrix, jnp.where(pruned, held, free))


def _compensated_changes(state: _Tableau) -> jax.Array:
    """Without i the cost falls by `½ a_i²/M_ii`, M = (P_SS)⁻¹ and a = M w_S; then j is added.

    Once i is kept, the compensated weight j is `r_j + G_ji a_i/M_ii` and its inverse curvature
    `R_jj + G_ji²/M_ii`, with `G = P_KS M`.
    """
    diagonal = jnp.diagonal(state.matrix)
    held, stiffness = state.vector[:, None], -diagonal[:, None]  # a and M_ii where i is pruned
    free, softness = state.vector[None], diagonal[None]  # r and R_jj where j is kept
    across = state.matrix
    moved = free + across * held / stiffness
    left = softness + across**2 / stiffness
    changes = (moved**2 / left - held**2 / stiffness) / 2
    # a positive number reduced to rounding error carries no information
    sound = (stiffness > 0) & (left > jnp.finfo(left.dtype).eps)
    return jnp.where(sound, changes, jnp.inf)


def _compensated_exchange(state: _Tableau, i: jax.Array, j: jax.Array) -> _Tableau:
    return _pivot(_pivot(state, i, -1), j, 1)


def _pivot(state: _Tableau, k: jax.Array, sign: int) -> _Tableau:
    """Rank-one update that moves k into the pruned set (sign 1) or out of it (sign −1)."""
    row, pivot, value = state.matrix[k], state.matrix[k, k], state.vector[k]
    matrix = state.matrix - jnp.outer(row, row) / pivot
    vector = state.vector - row * value / pivot
    edge = sign * row / pivot
    matrix = matrix.at[k].set(edge).at[:, k].set(edge).at[k, k].set(-1 / pivot)
    return _Tableau(matrix, vector.at[k].set(sign * value / pivot))


class _Slopes(NamedTuple):
    """First-order changes of the quadratic form: `c + H x`."""

    quadratic: jax.Array  # shape=(n, n)
    slope: jax.Array  # shape=(n,)


def _qubo_begin(linear: jax.Array, quadratic: jax.Array, pruned: jax.Array) -> _Slopes:
    return _Slopes(quadratic, linear + quadratic @ pruned.astype(quadratic.dtype))


def _qubo_changes(state: _Slopes) -> jax.Array:
    half = jnp.diagonal(state.quadratic) / 2
    without, with_it = half - state.slope, half + state.slope
    return without[:, None] + with_it[None] - state.quadratic


def _qubo_exchange(state: _Slopes, i: jax.Array, j: jax.Array) -> _Slopes:
    slope = state.slope + state.quadratic[j] - state.quadratic[i]
    return state._replace(slope=slope)


COMPENSATED = Objective(
    compensated_cost, _compensated_begin, _compensated_changes, _compensated_exchange
)
QUBO = Objective(qubo_cost, _qubo_begin, _qubo_changes, _qubo_exchange)
