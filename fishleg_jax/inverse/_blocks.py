"""Blocks of the inverse Fisher for tiles of weights: what `InverseFisher.blocks` returns."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from fishleg_jax._tiles import Tile

MOST = 64  # weights of a tile up to which its block is a dense matrix

Tiles = Sequence[Tile | None]  # of every leaf; None for a leaf without tiles


class Pieces(NamedTuple):
    """Blocks of Q, or of the Fisher, of all tiles of one leaf.

    Up to `MOST` weights a tile has one piece: its block `Q_BB` and the tangent's entries `v_B`.
    The block of a larger tile falls into independent pieces in other coordinates, as along a whole
    axis of a Kronecker product: then `v_Bᵀ Q_BB⁻¹ v_B` is the sum of `cᵀ M⁻¹ c` over the pieces,
    and for the Fisher `v_Bᵀ F_BB v_B` that of `cᵀ M c`.

    Attributes:
        coordinates: Coordinates c of the tangent, of shape (*grid, pieces, size).
        matrices: Matrices M, of shape (*grid, pieces, size, size).
    """

    coordinates: jax.Array
    matrices: jax.Array
