"""Placement of trees on devices: states are sharded like the parameters they belong to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fishleg_jax import _tree
from fishleg_jax._devices import mesh as _mesh


class Placement(NamedTuple):
    """Shardings of the leaves of a tree; hashable.  None leaves a leaf where it is."""

    leaves: tuple[NamedSharding | None, ...]

    def of(self, tree: Any) -> Any:
        """Returns a tree with these shardings."""
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(map(_put, leaves, self.leaves))

    def of_shapes(self, tree: Any) -> Any:
        """Returns the shapes and dtypes of a tree with these shardings attached."""
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(leaves, self.leaves, strict=True)
        return structure.unflatten(
            x if s is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in pairs
        )


def _put(x: Any, sharding: NamedSharding | None) -> Any:
    if sharding is None or _mesh.sharding_of(x) == sharding:
        return x
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if _mesh.explicit(sharding.mesh):
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def placed(function: Callable, placement: Placement, *arguments: Any) -> Any:
    """Calls a function and places its result."""
    return placement.of(function(*arguments))


def like(tree: Any, params: Any) -> Any:
    """Shards a tree with the parameters' structure like them, as far as that is known."""
    return placement_like(params).of(tree)


def placement_like(params: Any) -> Placement:
    """Placement of the parameters, as far as it is known."""
    return Placement(tuple(map(_mesh.sharding_of, jax.tree.leaves(params))))


def placement_for(state: Any, params: Any) -> Placement:
    """Placement of an estimator's state in which each part is sharded like its parameter.

    A part belongs to the parameter with the same path, or whose name is among its keys, else to all
    parameters.  A part of the parameter's shape is sharded like it; others over the same devices,
    along the first axis (of blocks) or else the longest that can be cut.

    Args:
        state: State arrays, or their shapes.
        params: Model parameters.

    Returns:
        Placement of the state, which changes nothing if the parameters' shardings are unknown.
    """
    # path, name, array and sharding of every parameter
    owners = [
        (path, _tree.leaf_name(path), x, _mesh.sharding_of(x))
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    ]
    known = [s for *_, s in owners if s is not None]
    if not known:
        return Placement((None,) * len(jax.tree.leaves(state)))
    mesh = known[0].mesh

    def one(path, x):
        # parameters that this part of the state belongs to
        keys = {getattr(entry, "key", None) for entry in path}
        own = [
            (leaf, sharding)
            for leaf_path, name, leaf, sharding in owners
            if sharding is not None and (name in keys or (leaf_path and _ends(path, leaf_path)))
        ]
        # shard it like one of the same shape, else over the devices of all its parameters
        for leaf, sharding in own:
            if leaf.shape == x.shape:
                return sharding
        theirs = [sharding for _, sharding in own] or (known if len(x.shape) > 1 else [])
        return NamedSharding(mesh, _cut(x.shape, mesh, _mesh.axes_of(theirs, mesh)))

    return Placement(tuple(one(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(state)))


def _ends(path: tuple, end: tuple) -> bool:
    return len(path) > len(end) and path[-len(end) :] == end


def _cut(shape: tuple[int, ...], mesh: Any, axes: tuple[str, ...]) -> PartitionSpec:
    for names, parts in _mesh.choices(axes, mesh):
        fitting = [k for k, n in enumerate(shape) if n and n % parts == 0]
        if fitting:
            best = 0 if fitting[0] == 0 else max(fitting, key=lambda k: shape[k])
            return PartitionSpec(*[None] * best, names)
    return PartitionSpec()
