"""Groups of weights that share a block of the Fisher: all, a leaf, or consecutive weights."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._devices import sharding


class Group(NamedTuple):
    """Leaves concatenated and cut into blocks of equal size.

    Attributes:
        name: Key in the state, and name in messages.
        leaves: Positions of the leaves in the flattened tree.
        shapes: Shapes of the leaves.
        blocks: Number of blocks.
        size: Size of a block, c; the last one is padded with zeros.
    """

    name: str
    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    blocks: int
    size: int

    @property
    def weights(self) -> int:
        """Number of weights, without padding."""
        return sum(map(math.prod, self.shapes))

    def parts(self, window: int) -> tuple["Group", ...]:
        """Splits a single block of several leaves into parts: leaves of one size, one per block.

        Concatenated leaves would be gathered if they are sharded.  One part per leaf would take
        many times as long to compile.

        Args:
            window: Number of weights up to which a block is not split.
        """
        if self.blocks > 1 or len(self.leaves) == 1 or self.size <= window:
            return (self,)
        by_size: dict[int, list] = {}
        for leaf in zip(self.leaves, self.shapes, strict=True):
            by_size.setdefault(math.prod(leaf[1]), []).append(leaf)
        return tuple(
            Group(self.name, *zip(*leaves, strict=True), len(leaves), size)
            for size, leaves in by_size.items()
            if size
        )

    def pack(self, leaves: list[jax.Array]) -> jax.Array:
        """Returns (blocks, size) from the leaves of a flattened tree."""
        return self._cut([sharding.along(x, 0)[None] if x.ndim else x[None] for x in leaves])[:, 0]

    def pack_rows(self, leaves: list[jax.Array]) -> jax.Array:
        """Returns (blocks, rows, size) from leaves with a leading axis of rows."""
        # shard along rows, so that each row is whole where it is flattened
        return self._cut([sharding.along(x, 0, examples=True) for x in leaves])

    def _cut(self, leaves: list[jax.Array]) -> jax.Array:
        parts = [leaves[i].reshape(leaves[i].shape[0], -1) for i in self.leaves]
        if len(parts) == self.blocks:
            return jnp.stack(parts)
        flat = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        flat = jnp.pad(flat, [(0, 0), (0, self.blocks * self.size - self.weights)])
        return jnp.moveaxis(flat.reshape(len(flat), self.blocks, self.size), 1, 0)

    def unpack(self, blocks: jax.Array, leaves: list[jax.Array]) -> None:
        """Writes (blocks, size) back into the leaves of a flattened tree."""
        if len(self.leaves) == self.blocks:
            for i, shape, block in zip(self.leaves, self.shapes, blocks, strict=True):
                leaves[i] = block.reshape(shape)
            return
        flat, begin = blocks.reshape(-1), 0
        for i, shape in zip(self.leaves, self.shapes, strict=True):
            end = begin + math.prod(shape)
            leaves[i] = flat[begin:end].reshape(shape)
            begin = end


def pack(parts: tuple[Group, ...], leaves: list[jax.Array]) -> list[jax.Array]:
    """Applies `Group.pack` to every part."""
    return [part.pack(leaves) for part in parts]


def unpack(parts: tuple[Group, ...], blocks: list[jax.Array], leaves: list[jax.Array]) -> None:
    """Inverse of `pack`."""
    for part, own in zip(parts, blocks, strict=True):
        part.unpack(own, leaves)


def make_groups(params: Any, block_size: int | str | None) -> tuple[Group, ...]:
    """Cuts a tree into groups.

    Args:
        params: Parameters, or their shapes.
        block_size: Maximum number of weights in a block, within a leaf; `leaf` for one block per
            leaf, None for a single block of all weights.
    """
    leaves = _tree.named_leaves(params)
    _tree.check_names(leaves)
    shapes = [tuple(jnp.shape(leaf)) for _, leaf in leaves]
    if block_size is None:
        total = sum(map(math.prod, shapes))
        return (Group("all", tuple(range(len(leaves))), tuple(shapes), 1, total),)
    groups = []
    for i, (name, _) in enumerate(leaves):
        weights = math.prod(shapes[i])
        blocks = 1 if block_size == "leaf" else max(-(-weights // block_size), 1)
        groups.append(Group(name, (i,), (shapes[i],), blocks, -(-weights // blocks)))
    return tuple(groups)


def check_block_size(block_size: int | str | None) -> None:
    """Raises a ValueError for an invalid block size."""
    number = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not (block_size is None or block_size == "leaf" or (number and block_size >= 1)):
        raise ValueError(
            "block_size must be at least 1, 'leaf' or None (one block of all), got "
            f"{_text.shown(block_size)}"
        )
