"""Random numbers of many leaves: shapes, dtypes, independence, and one draw to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishleg_jax import _random


@pytest.mark.parametrize("draw", [jax.random.normal, _random.signs])
def test_leaves_get_numbers_of_their_own(draw):
    leaves = [
        jax.ShapeDtypeStruct((40, 50), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.bfloat16),
        jax.ShapeDtypeStruct((2000,), jnp.float32),
        jax.ShapeDtypeStruct((0, 3), jnp.float32),
    ]
    drawn = _random.like(leaves, jax.random.key(0), draw)
    assert [(x.shape, x.dtype) for x in drawn] == [(x.shape, x.dtype) for x in leaves]
    one, other = np.asarray(drawn[0]).ravel(), np.asarray(drawn[2])
    for x in (one, other):
        assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_the_program_grows_little_with_the_number_of_leaves():
    """A draw for each of them took minutes to compile for networks with hundreds."""
    count = lambda n: str(
        jax.make_jaxpr(lambda key: _random.like([jnp.zeros(7)] * n, key))(jax.random.key(0))
    ).count("random_bits")
    assert count(1) == count(50) == 1
