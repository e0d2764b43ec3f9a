"""Algebra of a factor of Q: its product with a tensor, and its diagonal."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from fishleg_jax._devices import sharding
from fishleg_jax.inverse._kronecker import low_rank
from fishleg_jax.inverse.factors import Coordinates, Factor, Frame

HIGHEST = jax.lax.Precision.HIGHEST


def pad(factor: Factor, x: jax.Array) -> jax.Array:
    """Pads a tensor of shape `axes` with zeros to shape `padded`."""
    if factor.padded == factor.axes:
        return x
    return jnp.pad(x, [(0, m - n) for n, m in zip(factor.axes, factor.padded, strict=True)])


def crop(factor: Factor, x: jax.Array) -> jax.Array:
    """Inverse of `pad`."""
    return x[tuple(slice(n) for n in factor.axes)]


def to_blocks(factor: Factor, x: jax.Array, axis: int) -> jax.Array:
    """Unfolds a padded tensor along an axis into (blocks, size, rest)."""
    x = jnp.moveaxis(x, axis, 0)
    return x.reshape(factor.blocks[axis], factor.block_size(axis), -1)


def by_axis(
    function: Callable, factor: Factor, matrix: jax.Array, x: jax.Array, axis: int
) -> jax.Array:
    """Applies `function(matrix, unfolded)` to the blocks of one axis of a padded tensor.

    If the tensor is sharded, each device processes the whole axis and its shard of another one.
    """

    def one(matrix, x):
        rest = x.shape[:axis] + x.shape[axis + 1 :]
        product = function(matrix, to_blocks(factor, x, axis))
        return jnp.moveaxis(product.reshape(-1, *rest), 0, axis)

    other = other_axis(x.shape, axis)
    if other is not None:
        return sharding.local(one, (matrix, x), (None, other), other)
    # a tensor with one axis is sharded between blocks
    blocks = x.reshape(len(matrix), -1, 1)
    return sharding.local(function, (matrix, blocks), (0, 0), 0).reshape(x.shape)


def other_axis(shape: tuple[int, ...], axis: int) -> int | None:
    """Longest axis of a tensor except `axis`; None for a vector."""
    others = [k for k in range(len(shape)) if k != axis]
    return max(others, key=lambda k: shape[k], default=None)


def apply(factor: Factor, matrices: list[jax.Array], x: jax.Array) -> jax.Array:
    """Product of the Kronecker product of the dense axes' matrices with a padded tensor."""
    for axis, matrix in zip(factor.dense_axes, matrices, strict=True):
        if axis == len(factor.axes) - 1 and axis > 0:
            other = other_axis(x.shape, axis)
            x = sharding.local(_from_the_right, (matrix, x), (None, other), other)
        else:
            x = by_axis(partial(jnp.matmul, precision=HIGHEST), factor, matrix, x, axis)
    return x


def _from_the_right(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Product along the last axis; only whole rows of blocks are transposed, not single entries."""
    blocks, size, _ = matrix.shape
    rows = jnp.moveaxis(x.reshape(-1, blocks, size), 1, 0)
    product = jnp.matmul(rows, matrix.mT, precision=HIGHEST)
    return jnp.moveaxis(product, 0, 1).reshape(x.shape)


def rotate(factor: Factor, frame: Frame, x: jax.Array) -> jax.Array:
    """Rotates a tensor of shape `axes` into the frame: `(V_1 ⊗ V_2 ⊗ ...)ᵀ x`, padded."""
    return apply(factor, [frame.vectors[k].mT for k in factor.dense_axes], pad(factor, x))


def axis_damping(factor: Factor, axis: int, damping: jax.Array) -> jax.Array:
    """Damping `π_k γ^(1/n)` of one of n Kronecker factors.

    `Π π_k = 1`, and π_k balances the mean eigenvalues of the factors (Martens & Grosse 2015,
    section 6.3).  All unfoldings of a gradient have the same trace, so π_k depends on sizes only.
    """
    n = len(factor.dense_axes)
    mean_size = math.prod(factor.axes[k] for k in factor.dense_axes) ** (1 / n)
    return mean_size / factor.axes[axis] * damping ** (1 / n)


def roots(
    factor: Factor, frame: Frame, coordinates: Coordinates, damping: jax.Array
) -> list[jax.Array]:
    """Matrices R of the dense axes."""
    if not factor.triangles:
        return [frame.vectors[k] for k in factor.dense_axes]

    def root(axis):
        scale = jax.lax.rsqrt(frame.values[axis] + axis_damping(factor, axis, damping))
        if coordinates.triangles is None:
            return frame.vectors[axis] * scale[:, None, :]
        triangle = coordinates.triangles[axis]
        log_diagonal = jnp.diagonal(triangle, axis1=1, axis2=2)
        lower = jnp.tril(triangle, -1) + jax.vmap(jnp.diag)(jnp.exp(log_diagonal))
        return jnp.matmul(frame.vectors[axis] * scale[:, None, :], lower, precision=HIGHEST)

    return [root(k) for k in factor.dense_axes]


def middle(factor: Factor, frame: Frame, coordinates: Coordinates, damping: jax.Array) -> jax.Array:
    """Diagonal E between the roots, of shape `padded`."""
    if factor.spectrum:
        return _spectrum(frame, coordinates, damping)
    return jnp.ones(factor.padded, damping.dtype)


def _spectrum(frame: Frame, coordinates: Coordinates, damping: jax.Array) -> jax.Array:
    if coordinates.log_spectrum is None:
        return 1 / (frame.spectrum + damping)
    return jnp.exp(coordinates.log_spectrum) / (frame.spectrum + damping)


def multiply(
    factor: Factor, frame: Frame, coordinates: Coordinates, damping: jax.Array, vector: jax.Array
) -> jax.Array:
    """Product `Q v` for one leaf.

    Args:
        factor: Structure of Q.
        frame: Part of Q set from data.
        coordinates: Learned part of Q.
        damping: Damping γ, a positive scalar.
        vector: Array of the leaf's size, in any shape.

    Returns:
        Array of the vector's shape.
    """
    if factor.rank is not None:
        return low_rank.multiply(factor, frame, damping, vector)
    x = vector.reshape(factor.axes)
    d = None if coordinates.log_sandwich is None else jnp.exp(coordinates.log_sandwich)
    x = pad(factor, x if d is None else d * x)
    matrices = roots(factor, frame, coordinates, damping)
    if factor.spectrum:
        x = apply(factor, [r.mT for r in matrices], x)
        x = apply(factor, matrices, _spectrum(frame, coordinates, damping) * x)
    else:
        # form S = R Rᵀ first, which halves the products with the vector
        x = apply(factor, [jnp.matmul(r, r.mT, precision=HIGHEST) for r in matrices], x)
    x = crop(factor, x)
    x = x if d is None else d * x
    return x.reshape(vector.shape)


def fisher_diagonal_of(factor: Factor, frame: Frame) -> jax.Array:
    """Diagonal of the undamped Fisher represented by a frame, of shape `factor.axes`.

    The Fisher is `(V_1 ⊗ V_2 ⊗ ...) E (V_1 ⊗ V_2 ⊗ ...)ᵀ`, E the spectrum or `Λ_1 ⊗ Λ_2 ⊗ ...`.
    """
    if factor.rank is not None:
        return low_rank.diagonal_of(factor, frame, frame.spectrum)
    vectors = [frame.vectors[k] for k in factor.dense_axes]
    return crop(factor, apply(factor, [v**2 for v in vectors], eigenvalues(factor, frame)))


def eigenvalues(factor: Factor, frame: Frame) -> jax.Array:
    """Eigenvalues E of the undamped Fisher represented by a frame, of shape `padded`."""
    if factor.spectrum:
        return frame.spectrum
    along = [frame.values[axis] for axis in factor.dense_axes]
    product = jnp.ones(factor.padded, along[0].dtype)
    for axis, values in zip(factor.dense_axes, along, strict=True):
        shape = [1] * len(factor.padded)
        shape[axis] = -1
        product = product * values.reshape(shape)
    return product


def diagonal_of(
    factor: Factor, frame: Frame, coordinates: Coordinates, damping: jax.Array
) -> jax.Array:
    """Exact diagonal of Q, of shape `factor.axes`.  Arguments as in `multiply`."""
    if factor.rank is not None:
        return low_rank.diagonal_of(factor, frame, 1 / (frame.spectrum + damping))
    matrices = roots(factor, frame, coordinates, damping)
    # diag(R E Rᵀ) = (R ∘ R) diag(E), and (A ⊗ B) ∘ (A ⊗ B) = (A ∘ A) ⊗ (B ∘ B)
    between = middle(factor, frame, coordinates, damping)
    out = crop(factor, apply(factor, [r**2 for r in matrices], between))
    return out if coordinates.log_sandwich is None else out * jnp.exp(2 * coordinates.log_sandwich)
