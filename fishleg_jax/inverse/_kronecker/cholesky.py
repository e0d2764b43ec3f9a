"""Algebra of K-FAC's factors: Cholesky factors of the damped moments, and their inverses."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from fishleg_jax._devices import sharding
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._kronecker import algebra, blocks, frames


def triangles(factor: _factors.Factor, moments: Any, damping: jax.Array) -> list[jax.Array]:
    """Lower Cholesky factors of the damped matrices of all dense axes.

    A solve with them costs a small fraction of an eigendecomposition, and conjugate gradients
    preconditioned by this estimate take one solve per iteration.
    """

    def triangle(axis, matrix):
        # rounding leaves negative eigenvalues of up to this size
        least = matrix.shape[-1] * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(matrix))
        shift = jnp.maximum(algebra.axis_damping(factor, axis, damping), least)
        damped = matrix + shift * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
        one_by_one = partial(jax.lax.map, jnp.linalg.cholesky)  # see `frames.decompose`
        return sharding.local(one_by_one, (damped,), (0,), 0)

    matrices = frames.kronecker_factors(factor, moments)
    return [triangle(k, m) for k, m in zip(factor.dense_axes, matrices, strict=True)]


def solve(factor: _factors.Factor, triangles: list[jax.Array], vector: jax.Array) -> jax.Array:
    """Product of the inverse of the Kronecker product of `L Lᵀ` with a vector."""
    x = algebra.pad(factor, vector.reshape(factor.axes))
    for axis, lower in zip(factor.dense_axes, triangles, strict=True):
        x = algebra.by_axis(_solve_blocks, factor, lower, x, axis)
    return algebra.crop(factor, x).reshape(vector.shape)


def _solve_blocks(lower: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.map(lambda pair: cho_solve((pair[0], True), pair[1]), (lower, rows))


def inverses(triangles: jax.Array) -> jax.Array:
    """Inverse `L⁻¹` of every lower triangle."""

    def inverses(lower):
        eye = jnp.eye(lower.shape[-1], dtype=lower.dtype)
        return jax.lax.map(lambda one: solve_triangular(one, eye, lower=True), lower)

    return sharding.local(inverses, (triangles,), (0,), 0)


def by_roots(factor: _factors.Factor, roots: Sequence[jax.Array], vector: jax.Array) -> jax.Array:
    """Product of `(L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹`, of the Kronecker product, with a vector."""
    x = algebra.pad(factor, vector.reshape(factor.axes))
    x = algebra.apply(factor, roots, x)
    x = algebra.apply(factor, [root.mT for root in roots], x)
    return algebra.crop(factor, x).reshape(vector.shape)


def undamped_diagonal(factor: _factors.Factor, moments: Any) -> jax.Array:
    """Diagonal of the Kronecker product of the undamped factors, of shape `axes`."""
    factors = frames.kronecker_factors(factor, moments)
    return _outer(factor, [jnp.diagonal(matrix, axis1=1, axis2=2) for matrix in factors])


def diagonal_of(factor: _factors.Factor, roots: Iterable[jax.Array]) -> jax.Array:
    """Diagonal of `L⁻ᵀ L⁻¹`, of the Kronecker product, of shape `axes`."""
    return _outer(factor, (jnp.sum(root**2, axis=1) for root in roots))


def _outer(factor: _factors.Factor, along: Iterable[jax.Array]) -> jax.Array:
    """Outer product of one vector (blocks, size) per dense axis, of shape `axes`."""
    out = 1.0
    for axis, vector in zip(factor.dense_axes, along, strict=True):
        shape = [1] * len(factor.axes)
        shape[axis] = -1
        out = out * vector.reshape(shape)
    return algebra.crop(factor, out)


def inverse_matrix(factor: _factors.Factor, roots: Sequence[jax.Array]) -> blocks.Matrix:
    """The inverse as `R E Rᵀ`, `R = L⁻ᵀ` along every axis."""
    middle = jnp.ones(factor.padded, roots[0].dtype)
    return blocks.Matrix([root.mT for root in roots], middle)


def undamped_matrix(factor: _factors.Factor, moments: Any) -> blocks.Matrix:
    """The undamped Kronecker product as `V Λ Vᵀ`."""
    vectors, middle = [], jnp.ones((1,) * len(factor.padded))
    matrices = frames.kronecker_factors(factor, moments)
    for axis, matrix in zip(factor.dense_axes, matrices, strict=True):
        values, own = jax.lax.map(jnp.linalg.eigh, matrix)
        vectors.append(own)
        shape = [1] * len(factor.padded)
        shape[axis] = -1
        middle = middle * values.reshape(shape)
    return blocks.Matrix(vectors, jnp.broadcast_to(middle, factor.padded), orthogonal=True)
