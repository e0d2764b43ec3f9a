"""The textbook recursions of WoodFisher and M-FAC, for `experiments.benchmarks.woodbury`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

VECTORS_AT_ONCE = 8  # so few stay in the cache between the two products: fastest of 1, 4, 8, ..., m


class Recursion(NamedTuple):
    """The textbook recursion for one block of all weights.

    Attributes:
        count: number of gradients so far, i.
        vectors: `v_j / √(m + g_jᵀ v_j)` in rows, (m, d).
        diagonal: that of `F⁻¹`, (d,).
    """

    count: jax.Array  # shape=(), int32
    vectors: jax.Array
    diagonal: jax.Array


def start(weights: int, gradients: int, damping: float) -> Recursion:
    """The recursion before the first of m gradients of d weights, at damping γ."""
    rows = -(-gradients // VECTORS_AT_ONCE) * VECTORS_AT_ONCE
    count = jnp.zeros((), jnp.int32)
    return Recursion(count, jnp.zeros((rows, weights)), jnp.full(weights, 1 / damping))


def recursion(state: Recursion, rows: jax.Array, *, gradients: int, damping: float) -> Recursion:
    """The recursion with more gradients: 4 i d operations for the i-th.

    Args:
        state: the recursion so far.
        rows: gradients, (rows, d).
        gradients: m.
        damping: γ.
    """

    def add(row, state):
        g = rows[row]

        def subtract(part, v):
            u = jax.lax.dynamic_slice_in_dim(state.vectors, part * VECTORS_AT_ONCE, VECTORS_AT_ONCE)
            return v - (u @ g) @ u

        # those after the i-th are zero, and only as many as share its part are looked at
        v = jax.lax.fori_loop(0, -(-state.count // VECTORS_AT_ONCE), subtract, g / damping)
        u = v * jax.lax.rsqrt(gradients + g @ v)
        return Recursion(
            state.count + 1, state.vectors.at[state.count].set(u), state.diagonal - u**2
        )

    return jax.lax.fori_loop(0, len(rows), add, state)


def start_blocks(weights: int, block_size: int, damping: float) -> jax.Array:
    """`F⁻¹` of no gradients in blocks of one size, at most c: (blocks, size, size)."""
    blocks = -(-weights // block_size)
    eye = jnp.eye(-(-weights // blocks)) / damping
    return jnp.tile(eye, (blocks, 1, 1))


def block_recursion(inverse: jax.Array, rows: jax.Array, *, gradients: int) -> jax.Array:
    """The textbook recursion in blocks, with more gradients: 4 c d operations for each.

    Args:
        inverse: `F⁻¹` so far, (blocks, size, size).
        rows: gradients, (rows, d).
        gradients: m.
    """
    blocks, size, _ = inverse.shape
    padded = jnp.pad(rows, [(0, 0), (0, blocks * size - rows.shape[1])])

    def add(row, inverse):
        g = padded[row].reshape(blocks, size)
        v = jnp.einsum("bij,bj->bi", inverse, g)
        u = v * jax.lax.rsqrt(gradients + jnp.sum(g * v, axis=1, keepdims=True))
        return inverse - u[:, :, None] * u[:, None, :]

    return jax.lax.fori_loop(0, len(rows), add, inverse)
