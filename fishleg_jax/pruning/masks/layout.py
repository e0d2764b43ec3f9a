"""Layout of a pattern: the tiles into which it cuts the leaves of one tree.

A *unit* is a tile, or with couplings all tiles with one index, in several leaves.  Of an n:m tile
the weights that it would prune are one unit as well: units are ranked, and go one by one.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fishleg_jax import _tree
from fishleg_jax._tiles import Tile, covered, grid_of
from fishleg_jax.pruning.masks.patterns import Pattern

CONSTANTS = "constants/"  # how `find_couplings` names arrays that are no parameters


class Layout(NamedTuple):
    """Tiles of a tree's leaves; hashable, without arrays.

    Attributes:
        keep: Number of weights that a pruned tile keeps, n of n:m; 0 if it goes as a whole.
        families: Families of units, each a tuple of (position of a leaf, tile): a single one, or
            with couplings one for each coupled axis.  The tiles of a family have as many units, or
            a multiple of that, where the units repeat along the axis.
    """

    keep: int
    families: tuple[tuple[tuple[int, Tile], ...], ...]

    def tiles_of(self, leaf: int) -> list[Tile]:
        """Tiles of a leaf: none, one, or several if couplings meet in it."""
        return [tile for family in self.families for i, tile in family if i == leaf]

    @property
    def disjoint(self) -> bool:
        """Whether no leaf has several tiles."""
        leaves = [i for family in self.families for i, _ in family]
        return len(set(leaves)) == len(leaves)

    def part(self, leaves: Sequence[int], layered: bool = False) -> "Layout":
        """Layout of some leaves, numbered anew, or of a single layer of a stacked one."""
        number = {leaf: k for k, leaf in enumerate(leaves)}
        families = [
            tuple((number[i], tile[1:] if layered else tile) for i, tile in family if i in number)
            for family in self.families
        ]
        return Layout(self.keep, tuple(family for family in families if family))


def reasons(pattern: Pattern | None, names: Sequence[str]) -> list[str | None]:
    """Reason why a pattern leaves each leaf out; None for the others."""
    if pattern is None or not pattern.couplings:
        return [None] * len(names)
    coupled = {entry[0] for coupling in pattern.couplings for entry in coupling}
    return [None if name in coupled else "in no coupling of the pattern" for name in names]


@functools.lru_cache(maxsize=256)
def layout_of(
    pattern: Pattern,
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    chosen: tuple[bool, ...],
    stacked: tuple[bool, ...],
) -> Layout:
    """Cuts the leaves of a tree into the tiles of a pattern.

    Args:
        pattern: Pattern.
        names: Key path of every leaf.
        shapes: Shape of every leaf.
        chosen: Whether each leaf is prunable.
        stacked: Whether each leaf's leading axis is one of layers.

    Raises:
        ValueError: An axis that does not exist, an expression or a key path without a leaf, units
            that do not divide an axis, coupled axes with different numbers of units.
    """
    if pattern.couplings:
        seen: set[tuple[int, int]] = set()  # axes by leaf, over all couplings
        families = [
            _coupled(coupling, names, shapes, chosen, stacked, seen)
            for coupling in pattern.couplings
        ]
        families = [family for family in families if family]
        if not families:
            raise ValueError(f"pattern: no leaf of its couplings is prunable, got {pattern}")
    else:
        axes = axes_of(pattern, names)
        families = [
            ((i, _tile(pattern, names[i], shapes[i], stacked[i], axes[i])),)
            for i, yes in enumerate(chosen)
            if yes
        ]
    fits = lambda family: all(0 not in grid_of(shapes[i], tile) for i, tile in family)
    return Layout(pattern.keep, tuple(filter(fits, families)))


def most_to_prune(layout: Layout | None, shapes: Sequence[tuple[int, ...]], leaf: int) -> int:
    """Number of weights of a leaf that a pattern can prune."""
    if layout is None:
        return math.prod(shapes[leaf])
    tiles = layout.tiles_of(leaf)
    if not tiles:
        return 0
    if len(tiles) > 1:  # units that couplings make divide every axis
        return math.prod(shapes[leaf])
    tile = tiles[0]
    return covered(shapes[leaf], tile) // math.prod(tile) * (math.prod(tile) - layout.keep)


def axes_of(pattern: Pattern, names: Sequence[str]) -> list[int | None]:
    """Axis of every leaf, of the first expression that matches it."""
    if pattern.axis is None or isinstance(pattern.axis, int):
        return [pattern.axis] * len(names)
    default = -2 if pattern.kind == "n_m" else -1
    leaves = [(name, None) for name in names]
    found = [(_tree.matches(key, leaves, "pattern, axis"), axis) for key, axis in pattern.axis]
    return [next((axis for match, axis in found if match[i]), default) for i in range(len(names))]


def _tile(
    pattern: Pattern, name: str, shape: tuple[int, ...], stacked: bool, axis: int | None
) -> Tile:
    own = shape[1:] if stacked else shape
    layers = (1,) if stacked else ()
    if pattern.kind == "blocks":
        if len(own) < 2:
            raise ValueError(f"pattern: {pattern} needs two axes, but {name!r} has shape {own}")
        return (*layers, *[1] * (len(own) - 2), *pattern.sizes)
    position = _position(pattern, name, own, axis)
    (size,) = pattern.sizes
    if pattern.kind == "n_m":
        return (*layers, *[1] * position, size, *[1] * (len(own) - position - 1))
    return (*layers, *_unit(name, own, position, size))


def _position(pattern: object, name: str, shape: tuple[int, ...], axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"pattern: {pattern} has axis {axis}, but {name!r} has shape {shape}")
    return axis % len(shape)


def _unit(name: str, shape: tuple[int, ...], position: int, size: int) -> Tile:
    if shape[position] % size:
        raise ValueError(
            f"pattern: units of {size} indices must divide axis {position} of {name!r}, which has "
            f"shape {shape}"
        )
    return (*shape[:position], size, *shape[position + 1 :])


def _coupled(
    coupling: Sequence[tuple[str, int, int]],
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    chosen: Sequence[bool],
    stacked: Sequence[bool],
    seen: set[tuple[int, int]],
) -> tuple[tuple[int, Tile], ...]:
    members, numbers = [], {}
    for name, axis, size in coupling:
        if name not in names and name.startswith(CONSTANTS):
            continue
        if name not in names:
            raise ValueError(
                f"pattern: units couple {name!r}, which is no leaf; the leaves are: "
                + ", ".join(names)
            )
        i = names.index(name)
        own = shapes[i][1:] if stacked[i] else shapes[i]
        position = _position("units", name, own, axis)
        if (i, position) in seen:
            raise ValueError(f"pattern: couplings must name axis {position} of {name!r} once")
        seen.add((i, position))
        tile = _unit(name, own, position, size)
        layers = shapes[i][:1] if stacked[i] else ()
        numbers[f"{name!r} axis {axis}"] = (*layers, math.prod(grid_of(own, tile)))
        if chosen[i]:
            members.append((i, (*[1] * len(layers), *tile)))
    if len({n[:-1] for n in numbers.values()}) > 1 or not _repeat(numbers.values()):
        found = ", ".join(f"{key}: {'×'.join(map(str, n))}" for key, n in numbers.items())
        raise ValueError(
            f"pattern: coupled axes must have as many units each, or multiples, got {found}"
        )
    return tuple(members)


def _repeat(numbers: Iterable[tuple[int, ...]]) -> bool:
    """Whether numbers of units are equal, or without layers multiples of the smallest."""
    numbers = list(numbers)
    least = min(n[-1] for n in numbers)
    multiples = all(least and n[-1] % least == 0 for n in numbers)
    return len(set(numbers)) == 1 or (multiples and all(len(n) == 1 for n in numbers))
