"""The last m gradients of a block, and its damped inverse without a matrix of its size.

With n gradients in the rows of G, `F_γ⁻¹ = (I − Gᵀ (nγI + G Gᵀ)⁻¹ G) / γ`.  Computed in two ways:

- blocks no larger than the window: a square root of their size, `F_γ⁻¹ = A Aᵀ`;
- larger ones: the m×m system, whose matrix is updated gradient by gradient, through X with
  `X (nγI + G Gᵀ) Xᵀ = I`: `F_γ⁻¹ = (I − Gᵀ Xᵀ X G) / γ`.

If the damping is so small relative to the largest eigenvalue that rounding in a matrix of products
would drown it, the gradients themselves are used for refinement, see `basis`.

For a block of several leaves G is stored in parts, with leaves of one size stacked; sums over parts
have the size of the window, so every leaf keeps its sharding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax._devices import sharding
from fishleg_jax.inverse._kronecker.algebra import HIGHEST
from fishleg_jax.inverse._woodbury import basis, square_root
from fishleg_jax.inverse._woodbury.groups import Group

TILE = 250, 2048  # rows and columns of G whose products stay in the cache


class Window(NamedTuple):
    """Gradients of one group.

    Attributes:
        rows: Gradients G, (blocks, m, size) for each of the group's `parts`; zero in empty slots.
            For one block of several leaves the first axis runs over leaves.
        gram: Matrix `G Gᵀ`, (blocks, m, m); None for blocks no larger than the window.
    """

    rows: tuple[jax.Array, ...]
    gram: jax.Array | None


class Root(NamedTuple):
    """Inverse of one group, computed once for many products and diagonals.

    Attributes:
        damping: Damping γ of this inverse; it is recomputed when used at another damping.
        factor: Matrix A or X of every block, (blocks, size, size) or (blocks, m, m).
        diagonal: Diagonal of `F_γ⁻¹`, (blocks, size) for each part.
    """

    damping: jax.Array  # shape=(), float
    factor: jax.Array
    diagonal: tuple[jax.Array, ...]


Parts = Sequence[jax.Array]  # (blocks, size) for each of a group's parts


def empty(group: Group, window: int, dtype: jnp.dtype) -> Window:
    """Returns an empty window."""
    square = (group.blocks, window, window)
    gram = None if group.size <= window else jnp.zeros(square, dtype)
    return Window(
        tuple(jnp.zeros((part.blocks, window, part.size), dtype) for part in group.parts(window)),
        gram,
    )


def push(window: Window, rows: Parts, slots: jax.Array) -> Window:
    """Overwrites some slots of the window with rows (blocks, rows, size)."""
    rows = [sharding.along(sharding.halfway(x, 2, 1), 2) for x in rows]
    pairs = zip(window.rows, rows, strict=True)
    stored = tuple(old.at[:, slots].set(new, unique_indices=True) for old, new in pairs)
    if window.gram is None:
        return Window(stored, None)
    # unused rows are zero, and so is the diagonal of G Gᵀ there: skip the products with them
    used = jnp.any(window.gram.diagonal(axis1=1, axis2=2) > 0, axis=0)
    last = jnp.max(jnp.where(used, jnp.arange(len(used)), -1))
    filled = jnp.maximum(last, jnp.max(slots)) + 1
    pairs = zip(stored, rows, strict=True)
    products = _added(
        window, (sharding.local(_products, (*pair, filled), (2, 2, None), None) for pair in pairs)
    )
    gram = window.gram.at[:, :, slots].set(products, unique_indices=True)
    gram = gram.at[:, slots].set(products.mT, unique_indices=True)
    return Window(stored, gram)


def _added(window: Window, found: Iterable[jax.Array]) -> jax.Array:
    """Sum over parts, and over leaves as well if they form one block."""
    if window.gram is not None and len(window.gram) == 1:
        found = (x.sum(axis=0, keepdims=True) for x in found)
    return sum(found)


def _products(stored: jax.Array, rows: jax.Array, filled: jax.Array) -> jax.Array:
    """Products (blocks, m, rows) of the first `filled` of m rows with new ones; 0 for the rest."""
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
    """Zeroes pruned weights in the window; recomputes `G Gᵀ` only if that changes it."""
    pairs = list(zip(window.rows, kept, strict=True))
    rows = tuple(jnp.where(k[:, None], g, 0) for g, k in pairs)
    if window.gram is None:
        return Window(rows, None)
    changed = jnp.stack([jnp.any((g != 0) & ~k[:, None]) for g, k in pairs]).any()

    def make(_):
        return _added(window, (jnp.matmul(g, g.mT, precision=HIGHEST) for g in rows))

    return Window(rows, jax.lax.cond(changed, make, lambda gram: gram, window.gram))


def product(window: Window, count: jax.Array, x: Parts) -> list[jax.Array]:
    """Undamped product `F x = Gᵀ G x / n` for vectors (blocks, size) and n gradients."""
    pairs = zip(window.rows, x, strict=True)
    inner = _added(window, (jnp.einsum("bms,bs->bm", *pair, precision=HIGHEST) for pair in pairs))
    inner = inner / jnp.maximum(count, 1).astype(inner.dtype)

    def outer(g):
        each = jnp.broadcast_to(inner, (len(g), inner.shape[1]))
        return jnp.einsum("bms,bm->bs", g, each, precision=HIGHEST)

    return list(map(outer, window.rows))


def mean_squares(window: Window, count: jax.Array) -> list[jax.Array]:
    """Diagonal of the undamped `F = Gᵀ G / n`, (blocks, size) for each part."""
    return [jnp.sum(g**2, axis=1) / jnp.maximum(count, 1).astype(g.dtype) for g in window.rows]


def prepare(window: Window, count: jax.Array, damping: jax.Array) -> Root:
    """Precomputes the inverse of a window of `count` gradients for many products and diagonals."""
    count = _at_least_one(count, damping)
    factor = _factor(window, count, damping)
    return Root(damping, factor, _diagonal(window, count, damping, factor))


def multiply(
    window: Window, count: jax.Array, damping: jax.Array, x: Parts, root: Root | None = None
) -> list[jax.Array]:
    """Product `F_γ⁻¹ x` for vectors (blocks, size) and `count` gradients in the window."""
    count = _at_least_one(count, damping)
    make = lambda: _factor(window, count, damping)
    if window.gram is None:
        return [_with_root(root, damping, make, lambda a: square_root.multiply(a, *x))]
    factor = _with_root(root, damping, make, lambda a: a)

    def inner(g, v):
        return jnp.einsum("bms,bs->bm", g, v, precision=HIGHEST)

    y = _added(window, map(inner, window.rows, x))
    y = jnp.einsum("bij,bj->bi", factor, y, precision=HIGHEST)
    y = jnp.einsum("bij,bi->bj", factor, y, precision=HIGHEST)

    def left(g, v):
        each = jnp.broadcast_to(y, (len(g), y.shape[1]))
        return (v - jnp.einsum("bms,bm->bs", g, each, precision=HIGHEST)) / damping

    return list(map(left, window.rows, x))


def factor_of(window: Window, count: jax.Array, damping: jax.Array, root: Root | None) -> jax.Array:
    """Matrix A or X of every block, see `Root`; taken from a root for this damping."""
    number = _at_least_one(count, damping)
    return _with_root(root, damping, lambda: _factor(window, number, damping), lambda x: x)


def diagonal(
    window: Window, count: jax.Array, damping: jax.Array, root: Root | None = None
) -> list[jax.Array]:
    """Diagonal of `F_γ⁻¹`, (blocks, size) for each part."""
    count = _at_least_one(count, damping)

    make = lambda: _diagonal(window, count, damping, _factor(window, count, damping))
    return list(make() if root is None else _if_sound(root, damping, lambda: root.diagonal, make))


def _at_least_one(count: jax.Array, damping: jax.Array) -> jax.Array:
    return jnp.maximum(count, 1).astype(damping.dtype)


def _with_root(root: Root | None, damping: jax.Array, make: Callable, use: Callable) -> Any:
    """Applies `use` to A or X, taken from a root for this damping or else computed by `make`."""
    if root is None:
        return use(make())
    return _if_sound(root, damping, lambda: use(root.factor), lambda: use(make()))


def _if_sound(root: Root, damping: jax.Array, of_root: Callable, anew: Callable) -> Any:
    """Calls `of_root` if the root was computed for this damping, else `anew`."""
    return jax.lax.cond(root.damping == damping, of_root, anew)


def _factor(window: Window, count: jax.Array, damping: jax.Array) -> jax.Array:
    """Matrix A or X of every block, see `Root`."""
    if window.gram is None:
        arguments = *window.rows, count, damping
        return sharding.local(basis.square_roots, arguments, (0, None, None), 0)
    if len(window.gram) == 1:  # a loop would copy the gradients
        return basis.orthonormal(window.rows, window.gram[0], count * damping)[None]
    (rows,) = window.rows  # only a single block has several parts
    one = lambda block: basis.orthonormal([block[0][None]], block[1], count * damping)
    return jax.lax.map(one, (rows, window.gram))


def _diagonal(
    window: Window, count: jax.Array, damping: jax.Array, factor: jax.Array
) -> tuple[jax.Array, ...]:
    """Diagonal of `F_γ⁻¹` from A or X."""
    if window.gram is None:
        return (square_root.diagonal(factor),)

    def part(g, lower):
        left = 1 - sum(jnp.sum(tile**2, axis=1) for tile in basis.by_tiles(lower, g))
        # if one weight has all the curvature, cancellation may leave no digit: use the lower bound
        return jnp.maximum(left / damping, 1 / (jnp.sum(g**2, axis=1) / count + damping))

    if len(factor) == 1:
        return tuple(_by_columns(part, g, factor[0]) for g in window.rows)
    (rows,) = window.rows
    one = lambda block: _by_columns(part, block[0][None], block[1])[0]
    return (jax.lax.map(one, (rows, factor)),)


def _by_columns(function, rows: jax.Array, shared: jax.Array) -> jax.Array:
    """Maps a function (blocks, m, columns), shared -> (blocks, columns) over chunks of columns."""

    def own(rows, shared):
        blocks, _, size = rows.shape
        at_once = min(size, max(basis.COLUMNS_AT_ONCE // blocks, 1))
        whole = size // at_once

        def part(i):
            columns = jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once, axis=2)
            return function(columns, shared)

        out = jax.lax.map(part, jnp.arange(whole))
        out = jnp.moveaxis(out, 0, 1).reshape(blocks, -1)
        if size % at_once:
            out = jnp.concatenate([out, function(rows[:, :, whole * at_once :], shared)], axis=1)
        return out

    return sharding.local(own, (rows, shared), (2, None), 1)
