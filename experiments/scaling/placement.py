"""Placement of weights, batches and states of an estimate, from shapes alone.

Weights lie as with fully sharded data parallelism: each array is cut over all devices along its
longest axis that they divide, and is whole on each device where they divide none.  Batches are cut
along their examples.  Where states lie the library itself says.  A mesh may be abstract, which
tells of any number of devices where there are none.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fishleg_jax._devices import placement

AXIS = "devices"


def abstract_mesh(devices: int) -> AbstractMesh:
    """A row of devices that need not be there."""
    return AbstractMesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))


def mesh_of_cpu(devices: int) -> Mesh:
    """A row of devices of the CPU, which XLA can compile for."""
    found = jax.devices("cpu")
    if len(found) < devices:
        raise ValueError(
            f"the CPU has {len(found)} devices, not {devices}: set jax_num_cpu_devices"
        )
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=found[:devices])


def spread(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shapes of weights, cut over all devices of a mesh."""

    def one(x):
        fitting = [k for k, n in enumerate(x.shape) if n and n % mesh.size == 0]
        longest = max(fitting, key=lambda k: x.shape[k], default=None)
        spec = [] if longest is None else [None] * longest + [AXIS]
        return x.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(one, params)


def spread_batch(batch: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shapes of a batch, cut along its examples; whole where devices don't divide them."""

    def one(x):
        spec = [AXIS] if x.shape[0] % mesh.size == 0 else []
        return x.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(one, batch)


def spread_state(state: Any, params: Any) -> Any:
    """The shapes of a state, where the library puts it for weights that lie where these do."""
    return placement.placement_for(state, params).of_shapes(state)


def device_bytes(tree: Any) -> int:
    """The bytes of a tree on each of the devices over which its shapes are spread."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
