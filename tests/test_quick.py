"""What makes tests quick changes no value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (quick.DRAWS + 1,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_normal_numbers_are_those_of_jax(x64, key, shape, dtype):
    expected = jax.jit(lambda key: jax.random.normal(key, shape, dtype))(key)  # as it is
    found = jax.random.normal(key, shape, dtype)
    assert found.dtype == expected.dtype and found.weak_type == expected.weak_type
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("limits", [(0, 10), (-3, 4), (jnp.arange(5), 9)])
def test_whole_numbers_are_those_of_jax(key, limits):
    expected = jax.jit(lambda key: jax.random.randint(key, (5,), *limits))(key)
    np.testing.assert_array_equal(jax.random.randint(key, (5,), *limits), expected)
