"""Basis in which a damped Fisher is the identity, accurate to rounding at any damping.

For gradients G in rows and a shift σ, X satisfies `X (G Gᵀ + σI) Xᵀ = I`: the rows of
`X [G, √σ I]` are orthonormal.  X has the size of the window; G is only read, in products by column.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fishleg_jax._devices import sharding
from fishleg_jax.inverse._kronecker.algebra import HIGHEST

COLUMNS_AT_ONCE = 8192
BLOCKS_AT_ONCE = 32  # a loop over single small blocks is slow
TILE = 250  # rows at a time of triangular and symmetric matrices, whose other half is skipped
# A Cholesky factor is accurate to about 0.1 to 0.2 eps times the condition number of the matrix
# with a unit diagonal, and so is the inverse.  Above this bound on eps times that number it is
# refined.
TRUSTED_ERROR = 1e-3
POWER_STEPS = 10  # estimate that condition number within a factor of 2
# First shift of the refinement in units of eps ‖G Gᵀ‖; its factor has relative errors of 1e-3.
START_RATIO = 64
# Errors of `Gᵀ G` of small blocks are up to 2 eps: sums of similar gradients round alike.
START_RATIO_IN_BLOCKS = 1024
LOWERED = 1e-4  # factor on the shift per pass, whose own factor is accurate to 0.1 eps over that
# Gradients in float32 do not resolve directions this far below the largest.
SMALLEST_RATIO = 1.0  # σ over eps² ‖G Gᵀ‖


def orthonormal(rows: Sequence[jax.Array], gram: jax.Array, shift: jax.Array) -> jax.Array:
    """Lower triangular X with `X (G Gᵀ + σI) Xᵀ = I`.

    Uses the Cholesky factor of `G Gᵀ + σI` if that is well conditioned once its rows and columns
    are scaled.  Otherwise shifted Cholesky QR (Fukaya et al. 2020, Shifted Cholesky QR for
    computing the QR factorization of ill-conditioned matrices): it starts with a larger shift and
    lowers it in passes over the gradients, each of which recomputes a small, well-conditioned
    matrix `X G Gᵀ Xᵀ`.

    Args:
        rows: Parts of the gradients, (blocks, m, size) each; all blocks together form a gradient.
        gram: Matrix `G Gᵀ`, (m, m).
        shift: Shift σ, of shape ().
    """
    shift = _resolved(gram, shift)
    direct, error = _by_cholesky((gram + shift * jnp.eye(len(gram), dtype=gram.dtype))[None])
    refine = lambda: _refined(rows, gram, shift, START_RATIO)
    return jax.lax.cond(error[0] <= TRUSTED_ERROR, lambda: direct[0], refine)  # NaN is refined


def _resolved(gram: jax.Array, shift: jax.Array) -> jax.Array:
    """The shift, raised to the smallest that gradients in this precision resolve."""
    smallest = SMALLEST_RATIO * jnp.finfo(gram.dtype).eps ** 2 * jnp.linalg.norm(gram)
    return jnp.maximum(shift, smallest)


def _refined(
    rows: Sequence[jax.Array], gram: jax.Array, shift: jax.Array, ratio: float
) -> jax.Array:
    """Computes X in passes over the gradients, see `orthonormal`."""
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    first = jnp.maximum(shift, ratio * jnp.finfo(gram.dtype).eps * jnp.linalg.norm(gram))

    def lower(carry):
        now, basis = carry
        now = jnp.maximum(shift, LOWERED * now)
        matrix = now * _matmul(basis, basis.T)
        for g in rows:
            matrix += sharding.local(_gram_in_basis, (g, basis), (2, None), None)
        return now, _solve(jnp.linalg.cholesky(matrix), basis)

    basis = _solve(jnp.linalg.cholesky(gram + first * eye), eye)
    return jax.lax.while_loop(lambda carry: carry[0] > shift, lower, (first, basis))[1]


def _by_cholesky(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverses `L⁻¹` for matrices `L Lᵀ`, (b, n, n), and estimates (b,) of their relative errors.

    Errors of a matrix and of its factor scale with each row's own size, so the condition number of
    the matrix with a unit diagonal matters (Higham 2002, Accuracy and stability, theorem 10.5).
    Both are NaN if the factorisation of a matrix fails in its precision.
    """
    scale = jax.lax.rsqrt(matrices.diagonal(axis1=1, axis2=2))
    scaled = scale[:, :, None] * matrices * scale[:, None, :]
    eye = jnp.eye(scaled.shape[1], dtype=scaled.dtype)
    # block by block: see `frames.decompose`
    inverse = jax.lax.map(lambda one: _solve(jnp.linalg.cholesky(one), eye), scaled)
    # Power iterations for both ends of the spectrum, starting at rows that are large there.
    hardest = jnp.argmax(jnp.sum(inverse**2, axis=1), axis=1)
    starts = jnp.abs(scaled).sum(axis=1), eye[hardest]

    def step(_, vectors):
        v, w = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
        w = jnp.einsum("bij,bj->bi", inverse, w)
        return jnp.einsum("bij,bj->bi", scaled, v), jnp.einsum("bji,bj->bi", inverse, w)

    ends = jax.lax.fori_loop(0, POWER_STEPS, step, starts)
    largest, of_inverse = (jnp.linalg.norm(x, axis=1) for x in ends)
    return inverse * scale[:, None, :], jnp.finfo(scaled.dtype).eps * largest * of_inverse


def square_roots(rows: jax.Array, count: jax.Array, damping: jax.Array) -> jax.Array:
    """Upper triangular A with `A Aᵀ = F_γ⁻¹` for n gradients in rows (blocks, m, size).

    Computed from X of the transposed gradients, whose products have the size of a block.
    """
    blocks, _, size = rows.shape
    at_once = min(blocks, BLOCKS_AT_ONCE)

    def roots(blocks):
        grams = _matmul(blocks, blocks.mT)
        shifts = jax.vmap(_resolved, (0, None))(grams, count * damping)
        eye = jnp.eye(size, dtype=rows.dtype)
        direct, errors = _by_cholesky(grams + shifts[:, None, None] * eye)
        sound = errors <= TRUSTED_ERROR

        # refine only the blocks with a large error
        def better(one):
            columns, gram, shift, sound, root = one
            refine = lambda: _refined([columns[None]], gram, shift, START_RATIO_IN_BLOCKS)
            return jax.lax.cond(sound, lambda: root, refine)

        refine = lambda: jax.lax.map(better, (blocks, grams, shifts, sound, direct))
        return jax.lax.cond(sound.all(), lambda: direct, refine)

    def some(i, found):
        first = jnp.minimum(i * at_once, blocks - at_once)  # the last slice overlaps the one before
        part = jax.lax.dynamic_slice_in_dim(rows, first, at_once)
        found_here = jnp.sqrt(count) * roots(part.mT).mT
        return jax.lax.dynamic_update_slice_in_dim(found, found_here, first, axis=0)

    start = jnp.zeros((blocks, size, size), rows.dtype)
    if start.size == 0:
        return start
    return jax.lax.fori_loop(0, -(-blocks // at_once), some, start)


def times(matrix: jax.Array, blocks: jax.Array) -> jax.Array:
    """Product of a matrix with every block; batched, since unbatched it would copy the blocks."""
    return _matmul(jnp.broadcast_to(matrix, (len(blocks), *matrix.shape)), blocks)


def by_tiles(lower: jax.Array, blocks: jax.Array) -> list[jax.Array]:
    """Product of a lower triangular matrix with every block, in tiles of rows."""
    tops = range(0, len(lower), TILE)
    ends = [min(top + TILE, len(lower)) for top in tops]
    return [times(lower[a:b, :b], blocks[:, :b]) for a, b in zip(tops, ends, strict=True)]


def _gram_in_basis(rows: jax.Array, basis: jax.Array) -> jax.Array:
    """Matrix `X G Gᵀ Xᵀ`, (m, m), of a part (blocks, m, size), computed by chunks of columns."""
    blocks, window, size = rows.shape
    at_once = min(size, max(COLUMNS_AT_ONCE // blocks, 1))
    whole = size // at_once

    def of_columns(columns):
        tiles, products = by_tiles(basis, columns), []
        for i, tile in enumerate(tiles):  # the lower triangle suffices
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
