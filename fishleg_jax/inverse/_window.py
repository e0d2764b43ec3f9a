"""The last m gradients of a block, and its damped inverse without a matrix of its size.

With G the gradients in rows, n of them, `F_γ⁻¹ = (I − Gᵀ (nγI + G Gᵀ)⁻¹ G) / γ`.  Three ways to it:

- blocks no larger than the window: `nF_γ = Rᵀ R` by a QR factorisation of G above √(nγ) I;
- larger ones: the m×m system as it stands, its matrix kept up to date gradient by gradient;
- larger ones where the damping is so small beside the largest eigenvalue that rounding in `G Gᵀ`
  would drown it: an orthonormal basis of the gradients, in which `F_γ⁻¹` is a sum of
  positive terms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _sharding
from fishleg_jax.inverse._algebra import HIGHEST

COLUMNS_AT_ONCE = 8192
TILE = 250, 2048  # rows and columns of G whose products stay in the cache
ROWS_AT_ONCE = 50  # QR factorisations of wider blocks cost more an entry
# relative errors of the m×m system are about 0.1 eps ‖F‖ / γ; above 1e-3 at this ratio
TRUSTED_RATIO = 8  # γ over eps ‖F‖


class Window(NamedTuple):
    """Gradients of one group.

    Attributes:
        rows: G, (blocks, m, size); zero where none has come yet.
        gram: `G Gᵀ`, (blocks, m, m); None where a block is not larger than the window.
    """

    rows: jax.Array
    gram: jax.Array | None


def empty(blocks: int, window: int, size: int, dtype: jnp.dtype) -> Window:
    """A window of no gradients."""
    gram = None if size <= window else jnp.zeros((blocks, window, window), dtype)
    return Window(jnp.zeros((blocks, window, size), dtype), gram)


def push(window: Window, rows: jax.Array, slots: jax.Array) -> Window:
    """The window with rows (blocks, rows, size) in some slots, in place of what was there."""
    rows = _sharding.along(_sharding.halfway(rows, 2, 1), 2)
    stored = window.rows.at[:, slots].set(rows, unique_indices=True)
    if window.gram is None:
        return Window(stored, None)
    # rows that hold no gradient yet are zero, and so is the diagonal of G Gᵀ
    used = jnp.any(window.gram.diagonal(axis1=1, axis2=2) > 0, axis=0)
    last = jnp.max(jnp.where(used, jnp.arange(len(used)), -1))
    filled = jnp.maximum(last, jnp.max(slots)) + 1
    products = _sharding.local(_products, (stored, rows, filled), (2, 2, None), None)
    gram = window.gram.at[:, :, slots].set(products, unique_indices=True)
    gram = gram.at[:, slots].set(products.mT, unique_indices=True)
    return Window(stored, gram)


def _products(stored: jax.Array, rows: jax.Array, filled: jax.Array) -> jax.Array:
    """Products (blocks, m, rows) of the first `filled` of m rows with others; 0 for the rest."""
    blocks, window, size = stored.shape
    height, width = min(TILE[0], window), min(TILE[1], size)
    whole = size // width

    def by_rows(i, out):
        top = jnp.minimum(i * height, window - height)

        def tile(left, width):
            a = jax.lax.dynamic_slice(stored, (0, top, left), (blocks, height, width))
            b = jax.lax.dynamic_slice_in_dim(rows, left, width, axis=2)
            return jnp.matmul(a, b.mT, precision=HIGHEST)

        start = jnp.zeros((blocks, height, rows.shape[1]), rows.dtype)
        total = jax.lax.fori_loop(0, whole, lambda j, t: t + tile(j * width, width), start)
        if size % width:
            total += tile(whole * width, size % width)
        return jax.lax.dynamic_update_slice_in_dim(out, total, top, axis=1)

    start = jnp.zeros((blocks, window, rows.shape[1]), rows.dtype)
    filled = jnp.minimum(filled, window)
    return jax.lax.fori_loop(0, -(-filled // height), by_rows, start)


def mask(window: Window, kept: jax.Array) -> Window:
    """The window with zeros for pruned weights; `G Gᵀ` is made anew only where that changes it."""
    rows = jnp.where(kept[:, None], window.rows, 0)
    if window.gram is None:
        return Window(rows, None)
    changed = jnp.any((window.rows != 0) & ~kept[:, None])
    make = lambda gram: jnp.matmul(rows, rows.mT, precision=HIGHEST)  # noqa: E731
    return Window(rows, jax.lax.cond(changed, make, lambda gram: gram, window.gram))


def product(window: Window, count: jax.Array, x: jax.Array) -> jax.Array:
    """The undamped `F x = Gᵀ G x / n` of vectors (blocks, size), of n gradients in the window."""
    inner = jnp.einsum("bms,bs->bm", window.rows, x, precision=HIGHEST)
    outer = jnp.einsum("bms,bm->bs", window.rows, inner, precision=HIGHEST)
    return outer / jnp.maximum(count, 1).astype(x.dtype)


def multiply(window: Window, count: jax.Array, damping: jax.Array, x: jax.Array) -> jax.Array:
    """`F_γ⁻¹ x` for vectors (blocks, size), of `count` gradients in the window."""
    count = jnp.maximum(count, 1).astype(x.dtype)
    if window.gram is None:
        return jax.lax.map(lambda a: _multiply_small(a[0], count, damping, a[1]), (window.rows, x))

    def by_system(rows, gram, x):
        lower = _cholesky(gram, count * damping)
        y = jax.scipy.linalg.cho_solve((lower, True), jnp.matmul(rows, x, precision=HIGHEST))
        return (x - jnp.matmul(y, rows, precision=HIGHEST)) / damping

    def by_basis(rows, gram, x):
        basis, root = _basis(rows, count, damping)
        inner = jnp.matmul(basis, x, precision=HIGHEST)
        outside = (x - jnp.matmul(inner, basis, precision=HIGHEST)) / damping
        inside = count * jax.scipy.linalg.cho_solve((root, False), inner)
        return outside + jnp.matmul(inside, basis, precision=HIGHEST)

    return _by_block(window, count * damping, by_system, by_basis, x)


def diagonal(window: Window, count: jax.Array, damping: jax.Array) -> jax.Array:
    """The diagonal of `F_γ⁻¹`, (blocks, size)."""
    count = jnp.maximum(count, 1).astype(window.rows.dtype)
    if window.gram is None:
        return jax.lax.map(lambda rows: _diagonal_small(rows, count, damping), window.rows)

    def by_system(rows, gram):
        lower = _cholesky(gram, count * damping)
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)

        def part(g, inverse):
            norms = jnp.zeros(g.shape[1], g.dtype)
            for top in range(0, len(g), TILE[0]):  # the inverse is lower triangular
                end = min(top + TILE[0], len(g))
                products = jnp.matmul(inverse[top:end, :end], g[:end], precision=HIGHEST)
                norms += jnp.sum(products**2, axis=0)
            return 1 - norms

        return _by_columns(part, rows, inverse) / damping

    def by_basis(rows, gram):
        basis, root = _basis(rows, count, damping)
        inverse = jax.scipy.linalg.solve_triangular(
            root, jnp.eye(len(root), dtype=root.dtype), lower=False
        ).T

        def part(q, inverse):
            outside = jnp.maximum(1 - jnp.sum(q**2, axis=0), 0)
            inside = jnp.sum(jnp.matmul(inverse, q, precision=HIGHEST) ** 2, axis=0)
            return jnp.stack([outside, inside], axis=1)

        outside, inside = _by_columns(part, basis, inverse).T
        return outside / damping + count * inside

    return _by_block(window, count * damping, by_system, by_basis)


def _by_block(window: Window, shift: jax.Array, by_system, by_basis, *arguments) -> jax.Array:
    """One of two functions of (rows, gram, ...) for every block, by the soundness of its system."""

    def one(block):
        rows, gram, *rest = block
        bound = TRUSTED_RATIO * jnp.finfo(gram.dtype).eps * jnp.linalg.norm(gram)
        return jax.lax.cond(shift > bound, by_system, by_basis, rows, gram, *rest)

    blocks = (window.rows, window.gram, *arguments)
    if len(window.rows) == 1:  # a loop would copy the gradients
        return one([x[0] for x in blocks])[None]
    return jax.lax.map(one, blocks)


def _cholesky(gram: jax.Array, shift: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(gram + shift * jnp.eye(len(gram), dtype=gram.dtype))


def _by_columns(function, rows: jax.Array, shared: jax.Array) -> jax.Array:
    """A function (m, columns), shared -> (columns, ...) of all columns, so many at a time."""

    def own(rows, shared):
        size = rows.shape[1]
        at_once = min(size, COLUMNS_AT_ONCE)
        whole = size // at_once

        def part(i):
            columns = jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once, axis=1)
            return function(columns, shared)

        out = jax.lax.map(part, jnp.arange(whole))
        out = out.reshape(-1, *out.shape[2:])
        if size % at_once:
            out = jnp.concatenate([out, function(rows[:, whole * at_once :], shared)])
        return out

    return _sharding.local(own, (rows, shared), (1, None), 0)


def _root(rows: jax.Array, count: jax.Array, damping: jax.Array) -> jax.Array:
    size = rows.shape[1]
    below = jnp.sqrt(count * damping) * jnp.eye(size, dtype=rows.dtype)
    return jnp.linalg.qr(jnp.concatenate([rows, below]), mode="r")


def _multiply_small(rows, count, damping, x):
    # rows of R may have negative diagonals, which does not matter to Rᵀ R
    return count * jax.scipy.linalg.cho_solve((_root(rows, count, damping), False), x)


def _diagonal_small(rows, count, damping):
    root = _root(rows, count, damping)
    eye = jnp.eye(len(root), dtype=root.dtype)
    inverse = jax.scipy.linalg.solve_triangular(root, eye, lower=False)
    return count * jnp.sum(inverse**2, axis=1)


def _basis(rows: jax.Array, count: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis Q of the gradients, in rows, and R with `Q nF_γ Qᵀ = Rᵀ R`.

    Block Gram-Schmidt, twice, each time with a QR factorisation inside the block: orthonormal to
    rounding whatever the gradients are, dependent or zero ones too.
    """
    window = len(rows)
    at_once = min(window, ROWS_AT_ONCE)
    blocks = -(-window // at_once)
    rows = jnp.pad(rows, [(0, blocks * at_once - window), (0, 0)])
    real = (jnp.arange(len(rows)) < window).astype(rows.dtype)

    def project(part, basis):
        inner = jnp.matmul(part, basis.T, precision=HIGHEST)
        part = part - jnp.matmul(inner, basis, precision=HIGHEST)
        q, r = _sharding.tall_qr(part.T)
        return inner, q.T, r.T

    def add(i, carry):
        basis, coefficients = carry
        part = jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once)
        first, part, scale = project(part, basis)
        second, part, turn = project(part, basis)
        inner = first + jnp.matmul(scale, second, precision=HIGHEST)
        own = jnp.matmul(scale, turn, precision=HIGHEST)
        inner = jax.lax.dynamic_update_slice(inner, own, (0, i * at_once))
        begin = (i * at_once, 0)
        # rows that only fill up the last part would make more directions than there may be
        part = part * jax.lax.dynamic_slice_in_dim(real, i * at_once, at_once)[:, None]
        basis = jax.lax.dynamic_update_slice(basis, part, begin)
        return basis, jax.lax.dynamic_update_slice(coefficients, inner, begin)

    start = jnp.zeros_like(rows), jnp.zeros((len(rows), len(rows)), rows.dtype)
    basis, coefficients = jax.lax.fori_loop(0, blocks, add, start)
    return basis, _root(coefficients, count, damping)
