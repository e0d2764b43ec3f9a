"""Couplings: axes of leaves that index the same units."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks.numbers import is_whole

Coupling = Sequence[Sequence[Any]]
EXPECTED = "a list of (key path, axis) or (key path, axis, block size)"


class Member(NamedTuple):
    """Axis of a leaf in a coupling: its index is `(outer, unit, inner)`, flattened.

    Attributes:
        name: Key path of the leaf.
        axis: Its axis, from 0.
        outer: Number of times that the units follow each other.
        units: Number of units.
        inner: Number of neighbouring indices of one unit.
    """

    name: str
    axis: int
    outer: int
    units: int
    inner: int

    def indices(self, units: np.ndarray) -> np.ndarray:
        """Indices along the axis that belong to some units, in the units' order."""
        grid = np.arange(self.outer * self.units * self.inner)
        return grid.reshape(self.outer, self.units, self.inner)[:, units].ravel()

    def take(self, leaf: Any, units: np.ndarray) -> np.ndarray:
        """Returns the leaf with these units alone, or in this order."""
        return np.take(np.asarray(leaf), self.indices(units), axis=self.axis)

    def by_unit(self, leaf: Any) -> np.ndarray:
        """The leaf as an array of shape (outer, units, inner, entries of the other axes)."""
        array = np.moveaxis(np.asarray(leaf), self.axis, 0)
        return array.reshape(self.outer, self.units, self.inner, -1)

    def emptied(self, leaf: Any, units: np.ndarray) -> np.ndarray:
        """A copy of the leaf with zeros at some units."""
        found = np.array(leaf)
        np.moveaxis(found, self.axis, 0)[self.indices(units)] = 0
        return found

    @property
    def short(self) -> tuple:
        """The member as users write it."""
        start = (self.name, self.axis)
        return start if self.inner == 1 else (*start, self.inner)


def leaves_of(params: Any, constants: Any) -> dict[str, Any]:
    """Leaves by key path; those of the constants begin with `constants/`."""
    leaves = _tree.named_leaves(params)
    if constants is not None:
        leaves += _tree.named_leaves({"constants": constants})
    _tree.check_names(leaves)
    return dict(leaves)


def read(coupling: Any, leaves: dict[str, Any], argument: str) -> tuple[Member, ...]:
    """Returns the members of a coupling that a user wrote.

    Args:
        coupling: List of `(key path, axis)` or `(key path, axis, block size)`.
        leaves: Leaves by key path.
        argument: Name of the coupling for error messages.

    Raises:
        ValueError: Another type, an unknown leaf, an axis or a block that it lacks, members with
            different numbers of units, or the same member twice.
    """
    if isinstance(coupling, str) or not isinstance(coupling, Sequence) or not coupling:
        raise ValueError(f"{argument} must be {EXPECTED}, got {_text.shown(coupling)}")
    rows = [_row(entry, leaves, f"{argument}[{i}]") for i, entry in enumerate(coupling)]
    # The member in which the units come once decides on their number.
    units = min(size // block for _, _, size, block in rows)
    members = []
    for (name, axis, size, block), entry in zip(rows, coupling, strict=True):
        if size % (units * block):
            raise ValueError(
                f"{argument} needs the same number of units in every member, but the {size} "
                f"indices of {tuple(entry)!r} can't be divided among {units} units"
            )
        members.append(Member(name, axis, size // (units * block), units, block))
    if len(set(members)) < len(members):
        twice = next(x for x in members if members.count(x) > 1)
        raise ValueError(f"{argument} has {twice.short!r} twice")
    return tuple(members)


def _row(entry: Any, leaves: dict[str, Any], argument: str) -> tuple[str, int, int, int]:
    """Name, axis, size of the axis and block size of one member."""
    fits = isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) in (2, 3)
    if not fits or not isinstance(entry[0], str) or not all(is_whole(x, -99) for x in entry[1:]):
        raise ValueError(
            f"{argument} must be (key path, axis) or (key path, axis, block size), got "
            f"{_text.shown(entry)}"
        )
    name, axis, block = entry[0], int(entry[1]), int(entry[2]) if len(entry) == 3 else 1
    if name not in leaves:
        raise ValueError(f"{argument}: {name!r} is not a leaf; the leaves are: {', '.join(leaves)}")
    shape = jnp.shape(leaves[name])
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{argument}: {name!r} has no axis {axis}, its shape is {shape}")
    if block < 1 or shape[axis] % block or shape[axis] == 0:
        raise ValueError(
            f"{argument}: axis {axis} of {name!r} has {shape[axis]} indices, which can't be "
            f"divided into blocks of {block}"
        )
    return name, axis % len(shape), shape[axis], block


def read_all(couplings: Any, leaves: dict[str, Any]) -> list[tuple[Member, ...]]:
    """Returns the members of all couplings of a user; see `read`."""
    if isinstance(couplings, str) or not isinstance(couplings, Sequence):
        raise ValueError(f"couplings must be a list of couplings, got {_text.shown(couplings)}")
    found = [read(x, leaves, f"couplings[{i}]") for i, x in enumerate(couplings)]
    owners: dict[Member, int] = {}
    for i, members in enumerate(found):
        for member in members:
            if owners.setdefault(member, i) != i:
                raise ValueError(
                    f"couplings[{i}] has {member.short!r}, which couplings[{owners[member]}] has "
                    "as well: put both into one"
                )
    return found
