"""Leaves as matrices, and orthonormal bases of the subspaces that their gradients are kept in."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fishleg_jax import _tree
from fishleg_jax._devices import mesh as _mesh

HIGHEST = jax.lax.Precision.HIGHEST
LEAST = 8  # dimensions for a share: a classifier's few rows would have one, and too noisy lengths
# fields of the states of optax that hold second moments, which are never negative
SQUARES = ("nu", "nu_max", "sum_of_squares")


class Form(NamedTuple):
    """A leaf as matrices (…, small, large).

    Attributes:
        shape: Shape of the leaf.
        lead: Number of leading axes that stay: 1 for a stacked leaf, else 0.
        small: Size of the smaller side, whose subspace is kept.
        large: Size of the larger side.
        transposed: Whether the larger side comes first in the leaf.
    """

    shape: tuple[int, ...]
    lead: int
    small: int
    large: int
    transposed: bool

    def rank(self, rank: int | float) -> int:
        """Dimensions of the subspace for a number of them, or a share of the smaller side."""
        whole = isinstance(rank, numbers.Integral)
        wanted = int(rank) if whole else max(LEAST, round(float(rank) * self.small))
        return min(wanted, self.small)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Shape of the coordinates in a subspace of this rank."""
        return (*self.shape[: self.lead], rank, self.large)

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """Matrices (…, small, large) of a leaf; one that is sharded explicitly becomes whole."""
        sides = (self.large, self.small) if self.transposed else (self.small, self.large)
        matrix = whole(leaf, leaf).reshape(*self.shape[: self.lead], *sides)
        return matrix.mT if self.transposed else matrix

    def leaf(self, matrix: jax.Array, like: jax.Array) -> jax.Array:
        """The leaf of some matrices, with the dtype and the explicit sharding of another."""
        leaf = (matrix.mT if self.transposed else matrix).reshape(self.shape).astype(like.dtype)
        sharding = _mesh.sharding_of(like)
        if sharding is None or not _mesh.explicit(sharding.mesh):
            return leaf
        return jax.sharding.reshard(leaf, sharding)


def form_of(shape: tuple[int, ...], stacked: bool) -> Form | None:
    """Form of a leaf: its axes are cut where the smaller side is largest.

    Args:
        shape: Shape of the leaf.
        stacked: Whether its first axis is one of layers.

    Returns:
        The form; None for a leaf of fewer than two axes, or without entries.
    """
    lead = int(stacked)
    own = shape[lead:]
    if len(own) < 2 or not math.prod(shape):
        return None
    cuts = [(math.prod(own[:k]), math.prod(own[k:])) for k in range(1, len(own))]
    first, last = max(reversed(cuts), key=min)  # of equal ones the last: output channels
    return Form(shape, lead, min(first, last), max(first, last), first > last)


def whole(x: jax.Array, like: Any) -> jax.Array:
    """An array whole on every device of a mesh with Explicit axes, over which a tree is sharded."""
    mesh = _mesh.explicit_mesh(like)
    if mesh is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def refreshed(
    basis: jax.Array, matrix: jax.Array, width: int, first: jax.Array, start: jax.Array
) -> jax.Array:
    """Replaces the oldest columns of a basis by the leading directions of a gradient.

    These are of the part of the gradient outside of the columns that stay, by one power iteration
    from random directions.

    Args:
        basis: Orthonormal columns (…, small, rank), the oldest first.
        matrix: Gradient (…, small, large), finite.
        width: Number of columns to replace.
        first: Whether to replace all columns instead, which come from no gradient yet.
        start: Random directions (…, large, rank), standard normal.

    Returns:
        Orthonormal columns (…, small, rank).

    References:
        Halko, Martinsson & Tropp, Finding structure with randomness, SIAM Review 53, 2011,
        algorithm 4.4.
    """
    kept, rank = basis[..., width:], basis.shape[-1]
    several = width < rank
    largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    rest = matrix / jnp.where(largest > 0, largest, 1)  # or squares of tiny ones would vanish
    if several:
        rest = rest - jnp.where(first, 0, _product(kept, _product(kept.mT, rest)))
    columns = jnp.linalg.qr(_product(rest, start))[0]
    columns = _product(rest, _product(rest.mT, columns))
    if several:
        added = jnp.concatenate([kept, columns[..., :width]], axis=-1)
        columns = jnp.where(first, columns, added)
    return jnp.linalg.qr(columns)[0]


def turn(new: jax.Array, old: jax.Array) -> jax.Array:
    """Coordinates of old basis vectors in a new basis, `new^T old` (…, rank, rank)."""
    return _product(new.mT, old)


def rotated(state: Any, turns: dict[str, jax.Array], large: dict[str, int]) -> Any:
    """Takes an optimiser's state from old subspaces into new ones.

    Arrays are `T x` with `T = new^T old`, and second moments, which stay positive, `(T * T) x`:
    exact where the coordinates of the gradients are not correlated.

    Args:
        state: State of an optimiser of the coordinates.
        turns: `T` (…, rank, rank) of every projected leaf by its key path.
        large: Size of the larger side of every projected leaf by its key path.
    """
    shapes = {name: (*t.shape[:-1], large[name]) for name, t in turns.items()}

    def one(path, x):
        name = _owner(path, jnp.shape(x), shapes)
        if name is None:
            return x
        own = turns[name]
        squares = any(getattr(entry, "name", None) in SQUARES for entry in path)
        moved = _product(own * own if squares else own, x.astype(own.dtype))
        return moved.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(one, state)


def copies(state: Any, name: str, shape: tuple[int, ...]) -> int:
    """Number of arrays that an optimiser's state has for a leaf of this key path and shape."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return sum(_owner(path, jnp.shape(x), {name: shape}) is not None for path, x in found)


def _owner(path: tuple, shape: tuple, shapes: dict[str, tuple]) -> str | None:
    """Key path of the leaf that an array of an optimiser's state belongs to; None if to none.

    Its own path ends in that of the leaf, and it has the shape of its coordinates.
    """
    for k in range(len(path) + 1):
        name = _tree.leaf_name(path[k:])
        if shapes.get(name) == shape:
            return name
    return None


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)
