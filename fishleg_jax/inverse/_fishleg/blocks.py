"""Blocks of FishLeg's estimate for tiles of weights."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fishleg_jax.inverse._blocks import Pieces, Tiles
from fishleg_jax.inverse._fishleg.state import FishLegState
from fishleg_jax.inverse._kronecker import algebra, blocks
from fishleg_jax.inverse.factors import Coordinates, Factor, Frame


def blocks_of(
    units_of: Callable, state: FishLegState, tangent: Any, tiles: Tiles, fisher: bool
) -> list[Pieces | None]:
    """Blocks of Q, or of the Fisher as seen in the start; arguments as in `InverseFisher`.

    Args:
        units_of: Function `(tree) -> units`.
        state: State of the estimate.
        tangent: Pytree whose coordinates the pieces take.
        tiles: Tile of every leaf.
        fisher: Whether to return blocks of the Fisher.
    """

    def parts_of(unit):
        return state.frames[unit.name], state.average[unit.name]

    def inverse(factor: Factor, frame: Frame, coordinates: Coordinates) -> blocks.Matrix:
        outer = coordinates.log_sandwich
        return blocks.Matrix(
            algebra.roots(factor, frame, coordinates, state.damping),
            algebra.middle(factor, frame, coordinates, state.damping),
            None if outer is None else jnp.exp(outer),
            orthogonal=not factor.triangles,
        )

    def undamped(factor: Factor, frame: Frame, _: Coordinates) -> blocks.Matrix:
        vectors = [frame.vectors[k] for k in factor.dense_axes]
        return blocks.Matrix(vectors, algebra.eigenvalues(factor, frame), orthogonal=True)

    matrix_of = undamped if fisher else inverse
    return blocks.of_units(units_of(tangent), tangent, tiles, parts_of, matrix_of)
