"""The last m gradients of a block, and its damped inverse without a matrix of its size.

With G the gradients in rows, n of them, `F_γ⁻¹ = (I − Gᵀ (nγI + G Gᵀ)⁻¹ G) / γ`.  Three ways to it:

- blocks no larger than the window: `nF_γ = Rᵀ R` by a QR factorisation of G above √(nγ) I;
- larger ones: the m×m system as it stands, its matrix kept up to date gradient by gradient;
- larger ones where the damping is so small beside the largest eigenvalue that rounding in `G Gᵀ`
  would drown it: an orthonormal basis of the gradients, in which `F_γ⁻¹` is a sum of
  positive terms.

Of a block of several leaves G is kept leaf by leaf, and what is added up has the size of the
window: over devices every leaf stays spread as it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _sharding
from fishleg_jax.inverse._algebra import HIGHEST
from fishleg_jax.inverse._groups import Group

COLUMNS_AT_ONCE = 8192
TILE = 250, 2048  # rows and columns of G whose products stay in the cache
ROWS_AT_ONCE = 50  # QR factorisations of wider blocks cost more an entry
# relative errors of the m×m system are about 0.1 eps ‖F‖ / γ; above 1e-3 at this ratio
TRUSTED_RATIO = 8  # γ over eps ‖F‖


class Window(NamedTuple):
    """Gradients of one group.

    Attributes:
        rows: G, (blocks, m, size) for each of the group's `parts`; zero where none has come yet.
        gram: `G Gᵀ`, (blocks, m, m); None where a block is not larger than the window.
    """

    rows: tuple[jax.Array, ...]
    gram: jax.Array | None


Parts = Sequence[jax.Array]  # (blocks, size) for each of a group's parts


def empty(group: Group, window: int, dtype: jnp.dtype) -> Window:
    """A window of no gradients."""
    square = (group.blocks, window, window)
    gram = None if group.size <= window else jnp.zeros(square, dtype)
    return Window(
        tuple(jnp.zeros((part.blocks, window, part.size), dtype) for part in group.parts()), gram
    )


def push(window: Window, rows: Parts, slots: jax.Array) -> Window:
    """The window with rows (blocks, rows, size) in some slots, in place of what was there."""
    rows = [_sharding.along(_sharding.halfway(x, 2, 1), 2) for x in rows]
    pairs = zip(window.rows, rows, strict=True)
    stored = tuple(old.at[:, slots].set(new, unique_indices=True) for old, new in pairs)
    if window.gram is None:
        return Window(stored, None)
    # rows that hold no gradient yet are zero, and so is the diagonal of G Gᵀ
    used = jnp.any(window.gram.diagonal(axis1=1, axis2=2) > 0, axis=0)
    last = jnp.max(jnp.where(used, jnp.arange(len(used)), -1))
    filled = jnp.maximum(last, jnp.max(slots)) + 1
    products = sum(
        _sharding.local(_products, (*pair, filled), (2, 2, None), None)
        for pair in zip(stored, rows, strict=True)
    )
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


def mask(window: Window, kept: Parts) -> Window:
    """The window with zeros for pruned weights; `G Gᵀ` is made anew only where that changes it."""
    pairs = list(zip(window.rows, kept, strict=True))
    rows = tuple(jnp.where(k[:, None], g, 0) for g, k in pairs)
    if window.gram is None:
        return Window(rows, None)
    changed = jnp.stack([jnp.any((g != 0) & ~k[:, None]) for g, k in pairs]).any()
    make = lambda gram: sum(jnp.matmul(g, g.mT, precision=HIGHEST) for g in rows)  # noqa: E731
    return Window(rows, jax.lax.cond(changed, make, lambda gram: gram, window.gram))


def product(window: Window, count: jax.Array, x: Parts) -> list[jax.Array]:
    """The undamped `F x = Gᵀ G x / n` of vectors (blocks, size), of n gradients in the window."""
    pairs = zip(window.rows, x, strict=True)
    inner = sum(jnp.einsum("bms,bs->bm", g, v, precision=HIGHEST) for g, v in pairs)
    inner = inner / jnp.maximum(count, 1).astype(inner.dtype)
    return [jnp.einsum("bms,bm->bs", g, inner, precision=HIGHEST) for g in window.rows]


def multiply(window: Window, count: jax.Array, damping: jax.Array, x: Parts) -> list[jax.Array]:
    """`F_γ⁻¹ x` for vectors (blocks, size), of `count` gradients in the window."""
    count = jnp.maximum(count, 1).astype(x[0].dtype)
    if window.gram is None:
        pair = jnp.concatenate(window.rows, axis=2), jnp.concatenate(x, axis=1)
        return _cut(
            window, jax.lax.map(lambda a: _multiply_small(a[0], count, damping, a[1]), pair)
        )

    def by_system(rows, gram, x):
        lower = _cholesky(gram, count * damping)
        y = jax.scipy.linalg.cho_solve((lower, True), _inner(rows, x))
        own = lambda g, v: (v - jnp.matmul(y, g, precision=HIGHEST)) / damping
        return list(map(own, rows, x))

    def by_basis(rows, gram, x):
        basis, root = _basis(rows, count, damping)
        inner = _inner(basis, x)
        inside = count * jax.scipy.linalg.cho_solve((root, False), inner)

        def own(q, v):
            outside = (v - jnp.matmul(inner, q, precision=HIGHEST)) / damping
            return outside + jnp.matmul(inside, q, precision=HIGHEST)

        return list(map(own, basis, x))

    return _by_block(window, count * damping, by_system, by_basis, list(x))


def _inner(rows: Parts, x: Parts) -> jax.Array:
    pairs = zip(rows, x, strict=True)
    return sum(jnp.matmul(g, v, precision=HIGHEST) for g, v in pairs)


def diagonal(window: Window, count: jax.Array, damping: jax.Array) -> list[jax.Array]:
    """The diagonal of `F_γ⁻¹`, (blocks, size) for each part."""
    count = jnp.maximum(count, 1).astype(damping.dtype)
    if window.gram is None:
        rows = jnp.concatenate(window.rows, axis=2)
        return _cut(window, jax.lax.map(lambda g: _diagonal_small(g, count, damping), rows))

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

        return [_by_columns(part, g, inverse) / damping for g in rows]

    def by_basis(rows, gram):
        basis, root = _basis(rows, count, damping)
        inverse = jax.scipy.linalg.solve_triangular(
            root, jnp.eye(len(root), dtype=root.dtype), lower=False
        ).T

        def part(q, inverse):
            outside = jnp.maximum(1 - jnp.sum(q**2, axis=0), 0)
            inside = jnp.sum(jnp.matmul(inverse, q, precision=HIGHEST) ** 2, axis=0)
            return outside / damping + count * inside

        return [_by_columns(part, q, inverse) for q in basis]

    return _by_block(window, count * damping, by_system, by_basis)


def _cut(window: Window, x: jax.Array) -> list[jax.Array]:
    """(blocks, size) of all parts end to end, cut into these."""
    return jnp.split(x, np.cumsum([g.shape[2] for g in window.rows])[:-1], axis=1)


def _by_block(window: Window, shift: jax.Array, by_system, by_basis, *arguments) -> list[jax.Array]:
    """One of two functions of (rows, gram, ...) for every block, by the soundness of its system."""

    def one(block):
        rows, gram, *rest = block
        bound = TRUSTED_RATIO * jnp.finfo(gram.dtype).eps * jnp.linalg.norm(gram)
        return jax.lax.cond(shift > bound, by_system, by_basis, rows, gram, *rest)

    blocks = (window.rows, window.gram, *arguments)
    if len(window.gram) == 1:  # a loop would copy the gradients
        return [x[None] for x in one(jax.tree.map(lambda x: x[0], blocks))]
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


def _basis(rows: Parts, count: jax.Array, damping: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """An orthonormal basis Q of the gradients, in rows, and R with `Q nF_γ Qᵀ = Rᵀ R`.

    Block Gram-Schmidt, twice, each time with a QR factorisation inside the block: orthonormal to
    rounding whatever the gradients are, dependent or zero ones too.
    """
    window = len(rows[0])
    at_once = min(window, ROWS_AT_ONCE)
    blocks = -(-window // at_once)
    rows = [jnp.pad(g, [(0, blocks * at_once - window), (0, 0)]) for g in rows]
    padded, dtype = len(rows[0]), rows[0].dtype
    real = (jnp.arange(padded) < window).astype(dtype)

    def project(part, basis):
        inner = sum(jnp.matmul(p, b.T, precision=HIGHEST) for p, b in zip(part, basis, strict=True))
        part = [
            p - jnp.matmul(inner, b, precision=HIGHEST) for p, b in zip(part, basis, strict=True)
        ]
        q, r = _sharding.tall_qr([p.T for p in part])
        return inner, [x.T for x in q], r.T

    def add(i, carry):
        basis, coefficients = carry
        part = [jax.lax.dynamic_slice_in_dim(g, i * at_once, at_once) for g in rows]
        first, part, scale = project(part, basis)
        second, part, turn = project(part, basis)
        inner = first + jnp.matmul(scale, second, precision=HIGHEST)
        own = jnp.matmul(scale, turn, precision=HIGHEST)
        inner = jax.lax.dynamic_update_slice(inner, own, (0, i * at_once))
        begin = (i * at_once, 0)
        # rows that only fill up the last part would make more directions than there may be
        kept = jax.lax.dynamic_slice_in_dim(real, i * at_once, at_once)[:, None]
        basis = [
            jax.lax.dynamic_update_slice(b, p * kept, begin)
            for b, p in zip(basis, part, strict=True)
        ]
        return basis, jax.lax.dynamic_update_slice(coefficients, inner, begin)

    start = list(map(jnp.zeros_like, rows)), jnp.zeros((padded, padded), dtype)
    basis, coefficients = jax.lax.fori_loop(0, blocks, add, start)
    return basis, _root(coefficients, count, damping)
