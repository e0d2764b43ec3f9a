"""Whole numbers in the order of scores, and of positions."""

import jax
import jax.numpy as jnp


def places(shape: tuple[int, ...]) -> jax.Array:
    """Position of every entry in memory order: less than 2³² in a leaf."""
    places, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return places


def rank(score: jax.Array, mask: jax.Array) -> jax.Array:
    """Integer in the order of a non-negative score: its own bits; −1 for pruned weights."""
    integer = jnp.int64 if score.dtype == jnp.float64 else jnp.int32
    # the bits of −0.0 are those of a negative number
    return jnp.where(mask, jax.lax.bitcast_convert_type(jnp.abs(score), integer), -1)
