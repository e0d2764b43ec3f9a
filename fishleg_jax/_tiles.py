"""Tiles: equal boxes that an array is cut into, from its start; what is left over lies in none.

A tile is given by its shape, with as many axes as the array.  Four inputs of one output, a block of
4×4 weights and all weights of a channel are tiles.
"""

import math
from typing import Any

import jax

Tile = tuple[int, ...]


def grid_of(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Number of whole tiles along every axis.

    Example:
        >>> grid_of((9, 3), (4, 1))
        (2, 3)
    """
    return tuple(n // t for n, t in zip(shape, tile, strict=True))


def covered(shape: tuple[int, ...], tile: Tile) -> int:
    """Number of entries that lie in a tile."""
    return math.prod(grid_of(shape, tile)) * math.prod(tile)


def split(x: Any, tile: Tile) -> Any:
    """Cuts an array into tiles.

    Args:
        x: Array of JAX or NumPy; further axes behind those of the tile are kept.
        tile: Shape of a tile.

    Returns:
        Array of shape (*grid, entries of a tile, *further axes).
    """
    number, further = len(tile), x.shape[len(tile) :]
    grid = grid_of(x.shape[:number], tile)
    x = x[tuple(slice(n * t) for n, t in zip(grid, tile, strict=True))]
    x = x.reshape(*(k for pair in zip(grid, tile, strict=True) for k in pair), *further)
    outer, inner = range(0, 2 * number, 2), range(1, 2 * number, 2)
    x = x.transpose(*outer, *inner, *range(2 * number, x.ndim))
    return x.reshape(*grid, math.prod(tile), *further)


def join(tiles: jax.Array, tile: Tile, around: jax.Array) -> jax.Array:
    """Inverse of `split`.

    Args:
        tiles: Array of shape (*grid, entries of a tile).
        tile: Shape of a tile.
        around: Array of the result's shape, whose entries outside of all tiles are kept.
    """
    number, grid = len(tile), tiles.shape[:-1]
    x = tiles.reshape(*grid, *tile)
    x = x.transpose(*(k for i in range(number) for k in (i, number + i)))
    x = x.reshape(tuple(n * t for n, t in zip(grid, tile, strict=True)))
    if x.shape == around.shape:
        return x
    return around.at[tuple(slice(n) for n in x.shape)].set(x)
