"""The last m gradients of a block, and its damped inverse without a matrix of its size.

With G the gradients in rows, n of them, `F_γ⁻¹ = (I − Gᵀ (nγI + G Gᵀ)⁻¹ G) / γ`.  Three ways to it:

- blocks no larger than the window: `nF_γ = Rᵀ R` by a QR factorisation of G above √(nγ) I;
- larger ones: the m×m system as it stands, its matrix kept up to date gradient by gradient;
- larger ones where the damping is so small beside the largest eigenvalue that rounding in `G Gᵀ`
  would drown it: an orthonormal basis of the gradients, in which `F_γ⁻¹` is a sum of
  positive terms.

Of a block of several leaves G is kept in parts, with leaves of one size on top of each other, and
what is added up has the size of the window: over devices every leaf stays spread as it is.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _sharding
from fishleg_jax.inverse import _basis
from fishleg_jax.inverse._algebra import HIGHEST
from fishleg_jax.inverse._groups import Group

COLUMNS_AT_ONCE = 8192
TILE = 250, 2048  # rows and columns of G whose products stay in the cache
# relative errors of the m×m system are about 0.1 eps ‖F‖ / γ; above 1e-3 at this ratio
TRUSTED_RATIO = 8  # γ over eps ‖F‖


class Window(NamedTuple):
    """Gradients of one group.

    Attributes:
        rows: G, (blocks, m, size) for each of the group's `parts`; zero where none has come yet.
            Of one block of several leaves the first axis is of these.
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
        tuple(jnp.zeros((part.blocks, window, part.size), dtype) for part in group.parts(window)),
        gram,
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
    pairs = zip(stored, rows, strict=True)
    products = _added(
        window, (_sharding.local(_products, (*pair, filled), (2, 2, None), None) for pair in pairs)
    )
    gram = window.gram.at[:, :, slots].set(products, unique_indices=True)
    gram = gram.at[:, slots].set(products.mT, unique_indices=True)
    return Window(stored, gram)


def _added(window: Window, found: Iterable[jax.Array]) -> jax.Array:
    """The sum of what was found of each part; of leaves, too, where they make up one block."""
    if window.gram is not None and len(window.gram) == 1:
        found = (x.sum(axis=0, keepdims=True) for x in found)
    return sum(found)


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

    def make(_):
        return _added(window, (jnp.matmul(g, g.mT, precision=HIGHEST) for g in rows))

    return Window(rows, jax.lax.cond(changed, make, lambda gram: gram, window.gram))


def product(window: Window, count: jax.Array, x: Parts) -> list[jax.Array]:
    """The undamped `F x = Gᵀ G x / n` of vectors (blocks, size), of n gradients in the window."""
    pairs = zip(window.rows, x, strict=True)
    inner = _added(window, (jnp.einsum("bms,bs->bm", *pair, precision=HIGHEST) for pair in pairs))
    inner = inner / jnp.maximum(count, 1).astype(inner.dtype)

    def outer(g):
        each = jnp.broadcast_to(inner, (len(g), inner.shape[1]))
        return jnp.einsum("bms,bm->bs", g, each, precision=HIGHEST)

    return list(map(outer, window.rows))


def mean_squares(window: Window, count: jax.Array) -> list[jax.Array]:
    """The diagonal of the undamped `F = Gᵀ G / n`, (blocks, size) for each part."""
    return [jnp.sum(g**2, axis=1) / jnp.maximum(count, 1).astype(g.dtype) for g in window.rows]


def multiply(window: Window, count: jax.Array, damping: jax.Array, x: Parts) -> list[jax.Array]:
    """`F_γ⁻¹ x` for vectors (blocks, size), of `count` gradients in the window."""
    count = jnp.maximum(count, 1).astype(x[0].dtype)
    if window.gram is None:
        pair = *window.rows, *x
        return [jax.lax.map(lambda a: _multiply_small(a[0], count, damping, a[1]), pair)]

    def by_system(rows, gram, x):
        lower = _cholesky(gram, count * damping)
        y = jax.scipy.linalg.cho_solve((lower, True), _inner(rows, x))
        own = lambda g, v: (v - _outer(y, g)) / damping
        return list(map(own, rows, x))

    def by_basis(rows, gram, x):
        basis, root = _basis.orthonormal(rows, count, damping)
        inner = _inner(basis, x)
        inside = count * jax.scipy.linalg.cho_solve((root, False), inner)

        def own(q, v):
            return (v - _outer(inner, q)) / damping + _outer(inside, q)

        return list(map(own, basis, x))

    return _by_block(window, count * damping, by_system, by_basis, list(x))


def _inner(rows: Parts, x: Parts) -> jax.Array:
    pairs = zip(rows, x, strict=True)
    return sum(jnp.einsum("bms,bs->bm", *pair, precision=HIGHEST).sum(axis=0) for pair in pairs)


def _outer(y: jax.Array, g: jax.Array) -> jax.Array:
    return _basis.times(y[None], g)[:, 0]


def diagonal(window: Window, count: jax.Array, damping: jax.Array) -> list[jax.Array]:
    """The diagonal of `F_γ⁻¹`, (blocks, size) for each part."""
    count = jnp.maximum(count, 1).astype(damping.dtype)
    if window.gram is None:
        return [jax.lax.map(lambda g: _diagonal_small(g, count, damping), *window.rows)]

    def by_system(rows, gram):
        lower = _cholesky(gram, count * damping)
        eye = jnp.eye(len(gram), dtype=gram.dtype)
        inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)

        def part(g, inverse):
            norms = jnp.zeros((len(g), g.shape[2]), g.dtype)
            for top in range(0, len(inverse), TILE[0]):  # the inverse is lower triangular
                end = min(top + TILE[0], len(inverse))
                products = _basis.times(inverse[top:end, :end], g[:, :end])
                norms += jnp.sum(products**2, axis=1)
            return 1 - norms

        return [_by_columns(part, g, inverse) / damping for g in rows]

    def by_basis(rows, gram):
        basis, root = _basis.orthonormal(rows, count, damping)
        inverse = jax.scipy.linalg.solve_triangular(
            root, jnp.eye(len(root), dtype=root.dtype), lower=False
        ).T

        def part(q, inverse):
            outside = jnp.maximum(1 - jnp.sum(q**2, axis=1), 0)
            inside = jnp.sum(_basis.times(inverse, q) ** 2, axis=1)
            return outside / damping + count * inside

        return [_by_columns(part, q, inverse) for q in basis]

    return _by_block(window, count * damping, by_system, by_basis)


def _by_block(window: Window, shift: jax.Array, by_system, by_basis, *arguments) -> list[jax.Array]:
    """One of two functions of (rows, gram, ...) for every block, by the soundness of its system."""

    def one(block):
        rows, gram, *rest = block
        bound = TRUSTED_RATIO * jnp.finfo(gram.dtype).eps * jnp.linalg.norm(gram)
        return jax.lax.cond(shift > bound, by_system, by_basis, rows, gram, *rest)

    if len(window.gram) == 1:  # a loop would copy the gradients
        return one((window.rows, window.gram[0], *arguments))
    (rows,), *rest = window.rows, *arguments  # parts are only of one block
    loop = jax.tree.map(lambda x: x[:, None], ((rows,), *rest))
    found = jax.lax.map(lambda x: one((x[0], x[1], *x[2:])), (loop[0], window.gram, *loop[1:]))
    return [x[:, 0] for x in found]


def _cholesky(gram: jax.Array, shift: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(gram + shift * jnp.eye(len(gram), dtype=gram.dtype))


def _by_columns(function, rows: jax.Array, shared: jax.Array) -> jax.Array:
    """A function (blocks, m, columns), shared -> (blocks, columns), so many columns at a time."""

    def own(rows, shared):
        blocks, _, size = rows.shape
        at_once = min(size, max(COLUMNS_AT_ONCE // blocks, 1))
        whole = size // at_once

        def part(i):
            columns = jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once, axis=2)
            return function(columns, shared)

        out = jax.lax.map(part, jnp.arange(whole))
        out = jnp.moveaxis(out, 0, 1).reshape(blocks, -1)
        if size % at_once:
            out = jnp.concatenate([out, function(rows[:, :, whole * at_once :], shared)], axis=1)
        return out

    return _sharding.local(own, (rows, shared), (2, None), 1)


def _multiply_small(rows, count, damping, x):
    # rows of R may have negative diagonals, which does not matter to Rᵀ R
    return count * jax.scipy.linalg.cho_solve((_basis.root(rows, count, damping), False), x)


def _diagonal_small(rows, count, damping):
    root = _basis.root(rows, count, damping)
    eye = jnp.eye(len(root), dtype=root.dtype)
    inverse = jax.scipy.linalg.solve_triangular(root, eye, lower=False)
    return count * jnp.sum(inverse**2, axis=1)
