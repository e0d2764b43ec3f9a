"""Where the parts of a state lie, told by shapes on a mesh whose devices need not be there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from fishleg_jax._devices import placement

MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
BOTH = ("data", "model")


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 6), PartitionSpec(BOTH)),  # all devices cut it along blocks
        ((3, 24), PartitionSpec(None, BOTH)),
        ((3, 8, 24), PartitionSpec(None, None, BOTH)),  # along the longest axis
        ((12, 5), PartitionSpec("data")),  # eight devices divide neither axis, four do
        ((6, 5), PartitionSpec("model")),
        ((3, 5), PartitionSpec()),
    ],
)
def test_a_part_is_cut_by_as_many_devices_as_divide_it(shape, spec):
    sharding = NamedSharding(MESH, PartitionSpec(BOTH))
    params = {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}
    state = {"moments": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    (found,) = placement.placement_for(state, params).leaves
    assert found.spec == spec


def test_a_part_is_cut_by_the_axes_of_its_owner_alone():
    sharding = NamedSharding(MESH, PartitionSpec(None, "model"))
    params = {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}
    shapes = {"like": (16, 8), "other": (64, 3)}
    state = {n: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for n, s in shapes.items()}
    like, other = placement.placement_for(state, params).leaves
    assert like == sharding and other.spec == PartitionSpec("model")
