"""Cuts arrays down to the units that stay: weights, masks, gradients and optimiser states."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.pruning.gradual.state import holds_state

Cuts = dict[str, dict[int, np.ndarray]]  # indices that stay, by key path and axis


def cuts_of(couplings: Sequence[tuple[Member, ...]], alive: Sequence[np.ndarray]) -> Cuts:
    """Returns the indices that stay along every axis from which any goes.

    Args:
        couplings: Tuples of members.
        alive: Which units of each coupling stay, booleans.
    """
    along: dict[tuple[str, int], np.ndarray] = {}
    for members, living in zip(couplings, alive, strict=True):
        if living.all():
            continue
        for x in members:
            grid = np.broadcast_to(living[:, None], (x.outer, x.units, x.inner)).ravel()
            known = along.get((x.name, x.axis), True)
            along[x.name, x.axis] = grid & known
    cuts: Cuts = {}
    for (name, axis), stays in along.items():
        cuts.setdefault(name, {})[axis] = np.flatnonzero(stays)
    return cuts


def cut(leaf: Any, cuts: Mapping[int, np.ndarray]) -> Any:
    """Returns an array with the indices that stay, along every axis."""
    if not cuts:
        return leaf
    traced = isinstance(leaf, jax.core.Tracer)
    # NumPy compiles nothing, where JAX would for every shape
    found, take = (leaf, jnp.take) if traced else (np.asarray(leaf), np.take)
    for axis, indices in cuts.items():
        found = take(found, indices, axis=axis)
    return jnp.asarray(found)


@dataclasses.dataclass(frozen=True)
class Slicer:
    """Cuts trees that belong to the parameters.

    Attributes:
        paths: Name of every parameter, by its path.
        shapes: Shape of every parameter before, by name.
        cuts: Indices that stay, by name and axis.
    """

    paths: Mapping[tuple, str]
    shapes: Mapping[str, tuple[int, ...]]
    cuts: Cuts

    def like(self, tree: Any) -> Any:
        """Cuts a tree like the parameters; a ValueError names the first leaf that differs."""
        leaves = _tree.named_leaves(tree)
        names, expected = [name for name, _ in leaves], list(self.shapes)
        if names != expected:
            wrong = [x for x in (*names, *expected) if x not in names or x not in expected]
            raise ValueError(
                "tree must be like the parameters before compaction, but "
                f"{(wrong or names)[0]!r} differs"
            )
        for name, leaf in leaves:
            if jnp.shape(leaf) != self.shapes[name]:
                raise ValueError(
                    f"tree: {name!r} must have the shape before compaction, {self.shapes[name]}, "
                    f"got {jnp.shape(leaf)}"
                )
        found = [cut(leaf, self.cuts.get(name, {})) for name, leaf in leaves]
        return jax.tree.structure(tree).unflatten(found)

    def state(self, state: Any) -> Any:
        """Cuts the leaves of an optimiser's state that belong to parameters.

        These are the leaves whose path ends in that of a parameter and which have its shape.

        Raises:
            ValueError: The state of a gradual pruning, or a leaf that is like no single parameter.
        """
        if holds_state(state):
            raise ValueError(
                "state has that of a gradual pruning in it, whose estimate describes the network "
                "before: start the pruning anew with the smaller params, and cut the rest of the "
                "state alone (of flj.prune its `inner`)"
            )
        return jax.tree_util.tree_map_with_path(self._part, state)

    def _part(self, path: tuple, leaf: Any) -> Any:
        """Cuts one leaf of an optimiser's state."""
        ends = [path[k:] for k in range(len(path) + 1)]
        name = next((self.paths[end] for end in ends if end in self.paths), None)
        if name is not None and jnp.shape(leaf) == self.shapes[name]:
            return cut(leaf, self.cuts.get(name, {}))
        floating = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
        large = jnp.size(leaf) >= self._smallest  # smaller ones are constants of the optimiser
        if jnp.size(leaf) > 1 and large and floating and (name is None or name in self.cuts):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"state: {where!r} of shape {jnp.shape(leaf)} is not like one parameter before "
                "compaction, so it can't be cut: start this optimiser anew"
            )
        return leaf

    @property
    def _smallest(self) -> int:
        """Length of the shortest axis of a parameter from which any units go."""
        axes = [
            self.shapes[name][axis]
            for name in self.cuts
            if name in self.shapes
            for axis in self.cuts[name]
        ]
        return min(axes, default=0)
