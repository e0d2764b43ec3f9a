"""Frames from data: running second moments of a leaf's gradients, then their eigenvectors.

All gradients here are *Fisher samples*: random tensors M whose covariance is the Fisher, such as
the gradient of a batch's loss at labels drawn from the model, times the square root of its size.
"""

from functools import partial

import jax
import jax.numpy as jnp

from fishleg_jax._devices import sharding
from fishleg_jax.inverse._kronecker import low_rank
from fishleg_jax.inverse._kronecker.algebra import (
    HIGHEST,
    apply,
    other_axis,
    pad,
    rotate,
    to_blocks,
)
from fishleg_jax.inverse.factors import Coordinates, Factor, Frame


def empty_frame(factor: Factor, dtype: jnp.dtype) -> Frame:
    """Initial frame without data, for which Q is `I/γ`."""
    if factor.rank is not None:
        return low_rank.empty_frame(factor, dtype)

    def vectors(axis):
        size = factor.block_size(axis)
        return jnp.broadcast_to(jnp.eye(size, dtype=dtype), (factor.blocks[axis], size, size))

    def values(axis):
        return jnp.zeros((factor.blocks[axis], factor.block_size(axis)), dtype)

    return Frame(
        vectors=tuple(vectors(k) if b else None for k, b in enumerate(factor.blocks)),
        values=tuple(
            values(k) if b and factor.triangles else None for k, b in enumerate(factor.blocks)
        ),
        spectrum=jnp.zeros(factor.padded, dtype) if factor.spectrum else None,
    )


NOT_LEARNED = Coordinates(triangles=None, log_spectrum=None, log_sandwich=None)


def zero_coordinates(factor: Factor, dtype: jnp.dtype) -> Coordinates:
    """Initial coordinates, at which Q is given by the frame alone."""

    def triangle(axis):
        size = factor.block_size(axis)
        return jnp.zeros((factor.blocks[axis], size, size), dtype)

    return Coordinates(
        triangles=tuple(
            triangle(k) if b and factor.triangles else None for k, b in enumerate(factor.blocks)
        ),
        log_spectrum=jnp.zeros(factor.padded, dtype) if factor.spectrum else None,
        log_sandwich=jnp.zeros(factor.axes, dtype) if factor.sandwich else None,
    )


def zero_moments(factor: Factor, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Initial second moments, all zero."""
    if factor.rank is not None:
        return low_rank.zero_moments(factor, dtype)
    sizes = [(factor.blocks[k], factor.block_size(k)) for k in factor.dense_axes]
    return tuple(jnp.zeros((blocks, size, size), dtype) for blocks, size in sizes)


def moments_of(factor: Factor, sample: jax.Array) -> tuple[jax.Array, ...]:
    """Diagonal blocks of `M_(k) M_(k)ᵀ` for each dense axis, (blocks, size, size)."""

    padded = pad(factor, sample.reshape(factor.axes))

    def second(axis):
        def product(x):
            unfolded = to_blocks(factor, x, axis)
            return jnp.matmul(unfolded, unfolded.mT, precision=HIGHEST)

        other = other_axis(padded.shape, axis)
        return (
            product(padded) if other is None else sharding.local(product, (padded,), (other,), None)
        )

    return tuple(second(k) for k in factor.dense_axes)


def mean_moments(factor: Factor, samples: jax.Array) -> tuple[jax.Array, ...]:
    """Mean of `moments_of` over samples along a leading axis, in one product per dense axis."""
    padded = jax.vmap(partial(pad, factor))(samples.reshape(len(samples), *factor.axes))

    def second(axis):
        def product(x):
            unfolded = jnp.moveaxis(x, axis + 1, 0)
            unfolded = unfolded.reshape(factor.blocks[axis], factor.block_size(axis), -1)
            return jnp.matmul(unfolded, unfolded.mT, precision=HIGHEST)

        other = other_axis(padded.shape[1:], axis)
        if other is None:
            return product(padded)
        return sharding.local(product, (padded,), (other + 1,), None)

    return tuple(second(k) / len(samples) for k in factor.dense_axes)


def mean_spectrum(factor: Factor, frame: Frame, samples: jax.Array) -> jax.Array:
    """Mean squares of Fisher samples, along a leading axis, in the frame's eigenvectors."""
    if factor.rank is not None:
        return low_rank.mean_spectrum(factor, frame, samples)
    rotated = jax.vmap(partial(rotate, factor, frame))(samples.reshape(len(samples), *factor.axes))
    return jnp.mean(rotated**2, axis=0)


def spectrum_of(factor: Factor, frame: Frame, sample: jax.Array) -> jax.Array | None:
    """Squares of a Fisher sample in the frame's eigenvectors, or None without a spectrum."""
    if not factor.spectrum:
        return None
    return rotate(factor, frame, sample.reshape(factor.axes)) ** 2


def kronecker_factors(factor: Factor, moments: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Mean second moments, scaled so that their Kronecker product has the trace of the Fisher.

    With n dense axes and `t = E‖M‖²` each moment is divided by `t^((n-1)/n)`.
    """
    n = max(len(factor.dense_axes), 1)

    def scaled(moment):
        total = jnp.trace(moment, axis1=1, axis2=2).sum()
        # without gradients the moments are zero, and so are the factors
        return moment * jnp.maximum(total, jnp.finfo(moment.dtype).tiny) ** (1 / n - 1)

    return [scaled(moment) for moment in moments]


def decompose(factor: Factor, frame: Frame, moments: tuple[jax.Array, ...]) -> Frame:
    """Sets a frame to the eigenvectors and eigenvalues of `kronecker_factors`."""
    vectors, values = list(frame.vectors), list(frame.values)
    matrices = kronecker_factors(factor, moments)
    for axis, matrix in zip(factor.dense_axes, matrices, strict=True):
        # block by block: XLA for the CPU runs a batch of them on the same threads that wait for
        # it, and two such batches at once deadlock
        one_by_one = partial(jax.lax.map, jnp.linalg.eigh)
        eigenvalues, vectors[axis] = sharding.local(one_by_one, (matrix,), (0,), 0)
        if factor.triangles:
            values[axis] = jnp.maximum(eigenvalues, 0)  # rounding leaves small negative ones
    return frame._replace(vectors=tuple(vectors), values=tuple(values))


def turn(factor: Factor, frame: Frame, moments: tuple[jax.Array, ...]) -> Frame:
    """Frame of newer moments, with the old spectrum moved into its eigenvectors.

    The spectrum becomes the diagonal there of the Fisher that the old frame represents.
    """
    new = decompose(factor, frame, moments)
    if not factor.spectrum:
        return new
    turns = [
        jnp.matmul(new.vectors[k].mT, frame.vectors[k], precision=HIGHEST) ** 2
        for k in factor.dense_axes
    ]
    return new._replace(spectrum=apply(factor, turns, frame.spectrum))


def rescale(factor: Factor, coordinates: Coordinates, log_scale: jax.Array) -> Coordinates:
    """Returns the coordinates of `exp(log_scale) · Q`."""
    if factor.spectrum:
        return coordinates._replace(log_spectrum=coordinates.log_spectrum + log_scale)
    if factor.sandwich:
        return coordinates._replace(log_sandwich=coordinates.log_sandwich + log_scale / 2)
    (triangle,) = coordinates.triangles  # one axis: block-diagonal or full
    # scale C, stored as itself below the diagonal and as its logarithm on the diagonal
    below = jnp.tril(triangle, -1) * jnp.expm1(log_scale / 2)
    shift = log_scale / 2 * jnp.eye(triangle.shape[-1], dtype=triangle.dtype)
    return coordinates._replace(triangles=(triangle + below + shift,))
