"""Blocks of a factor's matrix for tiles of its leaf, without the matrix.

For `Q = D (R_1 ⊗ R_2 ⊗ ...) E (R_1 ⊗ R_2 ⊗ ...)ᵀ D` the entry of two weights sums `E` times
products of two rows of every R.  So along each axis the pairs of rows within a tile replace the
rows, as their squares do in the diagonal.  An axis that a tile covers wholly needs no pairs: with
`c = R⁻¹ w` along it the block falls into one piece for every column of R.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._tiles import Tile, grid_of, split
from fishleg_jax.inverse._blocks import MOST, Pieces, Tiles
from fishleg_jax.inverse._kronecker import algebra
from fishleg_jax.inverse._kronecker.units import Unit
from fishleg_jax.inverse.factors import Factor


class Matrix(NamedTuple):
    """Numbers of the matrix of one leaf, or of one layer.

    Attributes:
        roots: Matrices R of the dense axes, (blocks, size, size) each.
        middle: Diagonal E, of shape `padded`.
        outer: Diagonal D, of shape `axes`; None for ones.
        orthogonal: Whether all R are.
    """

    roots: list[jax.Array]
    middle: jax.Array
    outer: jax.Array | None = None
    orthogonal: bool = False


class _Axis(NamedTuple):
    """Tiles along one axis of a factor, into which several axes of the leaf may be merged.

    Attributes:
        grid: Number of tiles along each of the leaf's axes.
        places: Positions of every tile's weights along the factor's axis, (tiles, weights).
        whole: Whether the one tile there is gets pieces instead of pairs.
    """

    grid: tuple[int, ...]
    places: np.ndarray
    whole: bool


def of_units(
    units: Sequence[Unit],
    tangent: Any,
    tiles: Tiles,
    parts_of: Callable[[Unit], tuple],
    matrix_of: Callable[..., Matrix],
) -> list[Pieces | None]:
    """Pieces of all leaves.

    Args:
        units: Units of the tree.
        tangent: Pytree whose coordinates the pieces take.
        tiles: Tile of every leaf.
        parts_of: Function `(unit) -> parts`, the unit's part of a state.
        matrix_of: Function `(factor, *parts of one layer) -> Matrix`.

    Returns:
        Pieces for every leaf; None without a tile, for biases that share a kernel's factor, for
        `low_rank` factors, and for tiles too large that cover no axis.
    """
    leaves = jax.tree.leaves(tangent)
    found: list[Pieces | None] = [None] * len(leaves)
    for unit in units:
        i = unit.leaves[0]
        tile, shape = tiles[i], leaves[i].shape
        if tile is None or unit.factor.rank is not None or 0 in grid_of(shape, tile):
            continue
        if unit.stack is not None:
            if tile[0] != 1:
                continue
            tile, shape = tile[1:], shape[1:]
        axes = _axes(unit.factor, shape, tile)
        if axes is None:
            continue

        def of_layer(target, *parts, factor=unit.factor, axes=axes, tile=tile):
            return _pieces(factor, axes, tile, matrix_of(factor, *parts), target)

        found[i] = unit.each(of_layer, leaves[i], *parts_of(unit))
    return found


def _axes(factor: Factor, shape: tuple[int, ...], tile: Tile) -> list[_Axis] | None:
    """Tiles along every axis of a factor; None if the blocks would be too large.

    The factor may have a row more than the leaf along its first axis, that of a bias.
    """
    merged = len(shape) - len(factor.axes) + 1
    if merged < 1:
        return None
    groups = [range(merged), *([k] for k in range(merged, len(shape)))]
    axes = []
    for k, group in enumerate(groups):
        own, cut = tuple(shape[g] for g in group), tuple(tile[g] for g in group)
        number = math.prod(own)
        if number > factor.axes[k] or (k > 0 and number < factor.axes[k]):
            return None
        grid = grid_of(own, cut)
        places = split(np.arange(number).reshape(own), cut).reshape(math.prod(grid), -1)
        whole = len(places) == 1 and places.size == factor.axes[k]
        axes.append(_Axis(grid, places, whole))
    if math.prod(axis.places.shape[1] for axis in axes) <= MOST:
        return [axis._replace(whole=False) for axis in axes]
    left = math.prod(axis.places.shape[1] for axis in axes if not axis.whole)
    return axes if left <= MOST else None


def _pieces(
    factor: Factor, axes: list[_Axis], tile: Tile, matrix: Matrix, target: jax.Array
) -> Pieces:
    outer, in_pieces = matrix.outer, any(axis.whole for axis in axes)
    if outer is not None:  # without the row of a bias, like the leaf
        outer = outer.reshape(-1)[: target.size].reshape(target.shape)
    # Put pairs of rows in the place of rows along the axes that are cut.
    roots = dict(zip(factor.dense_axes, matrix.roots, strict=True))
    matrices = matrix.middle
    for k, axis in enumerate(axes):
        if not axis.whole:
            matrices = _paired(axis, roots.get(k), matrices, k)
    matrices = _ordered(axes, matrices, 2)
    if not in_pieces:
        coordinates = split(target, tile)[..., None, :]
        if outer is not None:
            scale = split(outer, tile)[..., None, :]
            matrices *= scale[..., None] * scale[..., None, :]
        return Pieces(coordinates, matrices)
    # Change to the coordinates in which whole axes fall into pieces.
    target = target if outer is None else target / outer
    rows = target.reshape(-1, *factor.axes[1:])
    x = algebra.pad(factor, jnp.pad(rows, _missing(rows.shape, factor.axes)))
    for k, axis in enumerate(axes):
        if not axis.whole:
            x = jnp.take(x, axis.places.reshape(-1), axis=k)
        elif k in roots:
            x = _along(_inverse(roots[k], matrix.orthogonal, factor.axes[k]), x, k)
    return Pieces(_ordered(axes, x, 1), matrices)


def _paired(axis: _Axis, root: jax.Array | None, x: jax.Array, k: int) -> jax.Array:
    """Sums of a tensor along axis k times products of two rows of R, for all pairs in a tile."""
    tiles, size = axis.places.shape
    if root is None:  # R is the identity: a weight pairs with itself only
        x = jnp.moveaxis(jnp.take(x, axis.places.reshape(-1), axis=k), k, -1)
        x = x.reshape(*x.shape[:-1], tiles, size)[..., None] * jnp.eye(size, dtype=x.dtype)
        return jnp.moveaxis(x.reshape(*x.shape[:-3], -1), -1, k)
    # rows of R one below the other; those of different blocks have nothing in common
    blocks, rows, _ = root.shape
    own = root.reshape(blocks * rows, -1)[axis.places]  # (tiles, size, columns)
    block = axis.places // rows
    same = block[:, :, None] == block[:, None, :]
    pairs = own[:, :, None] * own[:, None, :] * same[..., None]
    # sort the first weights of the pairs into the blocks along the axis
    of_row = jnp.zeros((blocks * rows, size, own.shape[-1]), root.dtype)
    of_row = of_row.at[axis.places.reshape(-1)].set(pairs.reshape(tiles * size, size, -1))
    summed = _along(of_row.reshape(blocks, rows * size, -1), x, k)
    summed = jnp.moveaxis(summed, k, -1)
    summed = summed.reshape(*summed.shape[:-1], blocks * rows, size)
    summed = jnp.take(summed, axis.places.reshape(-1), axis=-2)
    return jnp.moveaxis(summed.reshape(*summed.shape[:-2], -1), -1, k)


def _along(matrix: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Product of a block-diagonal matrix (blocks, rows, columns) with a tensor along an axis."""
    x = jnp.moveaxis(x, axis, 0)
    cut = x.reshape(len(matrix), matrix.shape[2], -1)
    out = jnp.matmul(matrix, cut, precision=algebra.HIGHEST)
    return jnp.moveaxis(out.reshape(-1, *x.shape[1:]), 0, axis)


def _inverse(root: jax.Array, orthogonal: bool, number: int) -> jax.Array:
    """Inverse of R along a whole axis of `number` weights.

    Eigenvectors of the padding behind the last weight mix with none but directions without
    curvature, but a learned triangle mixes it with others: then R gives way to a root of `R Rᵀ`
    without the padding.
    """
    if orthogonal:
        return root.mT
    blocks, size, _ = root.shape
    if number < blocks * size:
        weight = (jnp.arange(blocks * size) < number).reshape(blocks, size)
        both = weight[:, :, None] & weight[:, None, :]
        product = jnp.matmul(root, root.mT, precision=algebra.HIGHEST)
        root = jnp.linalg.cholesky(jnp.where(both, product, jnp.eye(size, dtype=root.dtype)))
    return jnp.linalg.inv(root)


def _missing(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(0, n - m) for m, n in zip(shape, axes, strict=True)]


def _ordered(axes: list[_Axis], x: jax.Array, times: int) -> jax.Array:
    """Tensor of shape (*grid, pieces, size) or (*grid, pieces, size, size), from one by axes."""
    shape, grid, pieces, sizes = [], [], [], [[] for _ in range(times)]
    for k, axis in enumerate(axes):
        grid += range(len(shape), len(shape) + len(axis.grid))
        shape += axis.grid
        pieces.append(len(shape))
        shape.append(x.shape[k] if axis.whole else 1)
        for own in sizes:
            own.append(len(shape))
            shape.append(1 if axis.whole else axis.places.shape[1])
    x = x.reshape(shape).transpose(*grid, *pieces, *(i for own in sizes for i in own))
    number = math.prod(shape[i] for i in pieces)
    size = math.prod(shape[i] for i in sizes[0])
    return x.reshape(*(shape[i] for i in grid), number, *[size] * times)
