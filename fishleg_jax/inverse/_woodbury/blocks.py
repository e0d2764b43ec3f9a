"""Blocks of the estimates from gradients, for tiles of weights.

A block of Q is a product of rows: of `A` for blocks stored as a square root, `Q_BB = A_B A_Bᵀ`; of
`Y = X G` for a window, `Q_BB = (I − Y_Bᵀ Y_B) / γ`; and `F_BB = G_Bᵀ G_B / n`.  Weights of a tile
that lie in different blocks of the estimate have nothing in common.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._tiles import grid_of, split
from fishleg_jax.inverse._blocks import MOST, Pieces, Tiles
from fishleg_jax.inverse._kronecker.algebra import HIGHEST
from fishleg_jax.inverse._woodbury.groups import Group
from fishleg_jax.inverse._woodbury.window import Root, Window, factor_of


class Rows:
    """Writes the pieces of the leaves of one group after the other.

    Attributes:
        found: Pieces of every leaf; None without a tile, and for tiles of more than `MOST` weights.
    """

    def __init__(self, tangent: list[jax.Array], tiles: Tiles):
        """Starts without pieces.

        Args:
            tangent: Leaves whose coordinates the pieces take.
            tiles: Tile of every leaf.
        """
        self.tangent, self.tiles = tangent, tiles
        self.found: list[Pieces | None] = [None] * len(tangent)

    def of_root(self, group: Group, root: jax.Array, damping: jax.Array, fisher: bool) -> None:
        """Pieces of a group stored as a square root A, (blocks, size, size)."""
        rows = root
        if fisher:  # F + γI = A⁻ᵀ A⁻¹: the columns of A⁻¹ stand in rows
            rows = jax.lax.map(jnp.linalg.inv, root).mT
        for leaf, own, block in self._leaves(group, rows):
            products = _products(own, block)
            if fisher:
                products -= damping * jnp.eye(products.shape[-1], dtype=products.dtype)
            self._set(leaf, products)

    def of_window(
        self,
        group: Group,
        parts: Sequence[Group],
        window: Window,
        count: jax.Array,
        damping: jax.Array,
        root: Root | None,
        fisher: bool,
    ) -> None:
        """Pieces of a group stored as gradients.

        Args:
            group: Group.
            parts: Its parts.
            window: Gradients G.
            count: Number of gradients in the window.
            damping: Damping γ.
            root: Inverse of the window, if the state is prepared; else None.
            fisher: Whether to return blocks of the Fisher.
        """
        number = jnp.maximum(count, 1).astype(damping.dtype)
        factor = None if fisher else factor_of(window, count, damping, root)
        if factor is not None and window.gram is None:
            self.of_root(group, factor, damping, False)
            return
        for part, gradients in zip(parts, window.rows, strict=True):
            inner = None
            if factor is not None:  # Y = X G
                inner = jax.lax.map(
                    lambda pair: jnp.matmul(*pair, precision=HIGHEST),
                    (jnp.broadcast_to(factor, (len(gradients), *factor.shape[1:])), gradients),
                )
            for leaf, own, block in self._leaves(part, gradients.mT):
                products = _products(own, block) / number
                if inner is not None:
                    eye = jnp.eye(products.shape[-1], dtype=products.dtype)
                    rows = next(rows for i, rows, _ in self._leaves(part, inner.mT) if i == leaf)
                    left = (eye - _products(rows, block)) / damping
                    products = _at_least(left, products + damping * eye)
                self._set(leaf, products)

    def _leaves(self, group: Group, rows: jax.Array) -> Iterator[tuple[int, jax.Array, np.ndarray]]:
        """Leaves with their rows and the numbers of their blocks, both in tiles.

        Args:
            group: Group, or a part of one.
            rows: Rows of the weights of every block, (blocks, size, columns).
        """
        flat, begin = rows.reshape(-1, rows.shape[-1]), 0
        for i, shape in zip(group.leaves, group.shapes, strict=True):
            end, tile = begin + math.prod(shape), self.tiles[i]
            if tile is not None and math.prod(tile) <= MOST and 0 not in grid_of(shape, tile):
                block = np.arange(begin, end).reshape(shape) // group.size
                yield i, split(flat[begin:end].reshape(*shape, -1), tile), split(block, tile)
            begin = end

    def _set(self, leaf: int, products: jax.Array) -> None:
        coordinates = split(self.tangent[leaf], self.tiles[leaf])[..., None, :]
        self.found[leaf] = Pieces(coordinates, products[..., None, :, :])


def _products(rows: jax.Array, block: np.ndarray) -> jax.Array:
    """Products of the rows of every tile, zero between different blocks."""
    products = jnp.matmul(rows, rows.mT, precision=HIGHEST)
    return jnp.where(block[..., :, None] == block[..., None, :], products, 0)


def _at_least(block: jax.Array, inverse_bound: jax.Array) -> jax.Array:
    """A block of Q, no smaller than the inverse of its block of the damped Fisher.

    `Q_BB ≥ (F_BB + γI)⁻¹`; where that is nearly an equality cancellation may leave no digit.
    """
    lower = jnp.linalg.cholesky(inverse_bound)
    values, vectors = jnp.linalg.eigh(jnp.matmul(lower.mT, jnp.matmul(block, lower)))
    turned = jax.scipy.linalg.solve_triangular(lower.mT, vectors, lower=False)
    return jnp.matmul(turned * jnp.maximum(values, 1)[..., None, :], turned.mT)
