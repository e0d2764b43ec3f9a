"""A basis in which a damped Fisher is the identity, right to rounding at any damping.

Of gradients G in rows and a shift σ, X with `X (G Gᵀ + σI) Xᵀ = I`: the rows of `X [G, √σ I]` are
orthonormal.  X has the size of the window, and G is only read, column by column, in products.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fishleg_jax import _sharding
from fishleg_jax.inverse._algebra import HIGHEST

COLUMNS_AT_ONCE = 8192
BLOCKS_AT_ONCE = 32  # a loop over single small blocks is slow
TILE = 250  # rows at a time of triangular and of symmetric matrices, whose other half is left out
# A factor of `G Gᵀ` has relative errors of about 0.1 eps ‖G Gᵀ‖ / σ, so 1e-3 at this ratio.
TRUSTED_RATIO = 64  # σ over eps ‖G Gᵀ‖
# Those of `Gᵀ G` of small blocks are up to 2 eps: like gradients, added up, are rounded alike.
TRUSTED_IN_BLOCKS = 1024
LOWERED = 1e-4  # the shift by one pass, whose own factor is right to 0.1 eps over that
# Gradients in float32 say nothing of directions so far below the largest.
SMALLEST_RATIO = 1.0  # σ over eps² ‖G Gᵀ‖


def orthonormal(
    rows: Sequence[jax.Array], gram: jax.Array, shift: jax.Array, trusted: float = TRUSTED_RATIO
) -> jax.Array:
    """X, lower triangular, with `X (G Gᵀ + σI) Xᵀ = I`.

    Cholesky QR with a shift (Fukaya et al. 2020, Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices): by the Cholesky factor of `G Gᵀ` where rounding in
    it is small beside σ.  Else it starts with a larger shift, and brings it down by passes over the
    gradients, in each of which a small, well-conditioned matrix `X G Gᵀ Xᵀ` is made anew.

    Args:
        rows: parts of the gradients, (blocks, m, size) each; all blocks together are a gradient.
        gram: `G Gᵀ`, (m, m).
        shift: σ, of shape ().
        trusted: from what σ over eps ‖G Gᵀ‖ the matrix is factored as it is.
    """
    norm, eps = jnp.linalg.norm(gram), jnp.finfo(gram.dtype).eps
    shift = jnp.maximum(shift, SMALLEST_RATIO * eps**2 * norm)
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    start = jnp.maximum(shift, trusted * eps * norm)

    def lower(carry):
        now, basis = carry
        now = jnp.maximum(shift, LOWERED * now)
        matrix = now * _matmul(basis, basis.T)
        for g in rows:
            matrix += _sharding.local(_gram_in_basis, (g, basis), (2, None), None)
        return now, _solve(jnp.linalg.cholesky(matrix), basis)

    basis = _solve(jnp.linalg.cholesky(gram + start * eye), eye)
    return jax.lax.while_loop(lambda carry: carry[0] > shift, lower, (start, basis))[1]


def square_roots(rows: jax.Array, count: jax.Array, damping: jax.Array) -> jax.Array:
    """A, upper triangular, with `A Aᵀ = F_γ⁻¹` of n gradients in rows, for (blocks, m, size).

    Of the transposed gradients, whose products have the size of a block, X is the root wanted.
    """
    blocks, _, size = rows.shape
    at_once = min(blocks, BLOCKS_AT_ONCE)

    def one(columns):
        gram = _matmul(columns, columns.T)
        return orthonormal([columns[None]], gram, count * damping, TRUSTED_IN_BLOCKS).T

    def some(i, found):
        first = jnp.minimum(i * at_once, blocks - at_once)  # the last ones overlap those before
        part = jax.lax.dynamic_slice_in_dim(rows, first, at_once)
        roots = jnp.sqrt(count) * jax.vmap(one)(part.mT)
        return jax.lax.dynamic_update_slice_in_dim(found, roots, first, axis=0)

    start = jnp.zeros((blocks, size, size), rows.dtype)
    if start.size == 0:
        return start
    return jax.lax.fori_loop(0, -(-blocks // at_once), some, start)


def times(matrix: jax.Array, blocks: jax.Array) -> jax.Array:
    """A matrix times every block; a product without a batch would copy the blocks, transposed."""
    return _matmul(jnp.broadcast_to(matrix, (len(blocks), *matrix.shape)), blocks)


def by_tiles(lower: jax.Array, blocks: jax.Array) -> list[jax.Array]:
    """The product of a lower triangular matrix and every block, in tiles of rows."""
    tops = range(0, len(lower), TILE)
    ends = [min(top + TILE, len(lower)) for top in tops]
    return [times(lower[a:b, :b], blocks[:, :b]) for a, b in zip(tops, ends, strict=True)]


def _gram_in_basis(rows: jax.Array, basis: jax.Array) -> jax.Array:
    """`X G Gᵀ Xᵀ`, (m, m), of a part (blocks, m, size) and X, so many columns at a time."""
    blocks, window, size = rows.shape
    at_once = min(size, max(COLUMNS_AT_ONCE // blocks, 1))
    whole = size // at_once

    def of_columns(columns):
        tiles, products = by_tiles(basis, columns), []
        for i, tile in enumerate(tiles):  # the lower triangle will do
            before = jnp.concatenate(tiles[: i + 1], axis=1)
            product = _matmul(tile, before.mT).sum(axis=0)
            products.append(jnp.pad(product, [(0, 0), (0, window - product.shape[1])]))
        return jnp.concatenate(products)

    def add(i, total):
        return total + of_columns(jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once, axis=2))

    total = jax.lax.fori_loop(0, whole, add, jnp.zeros((window, window), rows.dtype))
    if size % at_once:
        total += of_columns(rows[:, :, whole * at_once :])
    return jnp.tril(total) + jnp.tril(total, -1).T


def _solve(lower: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(lower, right, lower=True)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)
