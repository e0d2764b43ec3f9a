"""Checks of what users hand in: sound input of every make passes, unsound input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishleg_jax._checks import arrays

X, Y = np.ones((4, 3), np.float32), np.zeros(4, np.int32)


@pytest.mark.parametrize(
    "params",
    [
        {"w": X},
        [jnp.ones(2, jnp.bfloat16), jnp.ones((), jnp.float16)],
        jnp.ones((0, 3)),
        {"w": np.full(2, 1e300)},  # finite in float64
    ],
    ids=["numpy", "narrow", "empty", "double"],
)
def test_sound_weights_pass(params):
    arrays.check_params(params)


SOUND_BATCHES = {
    "arrays": [(X, Y)],
    "no targets": [(X, None)],
    "constants": [(X, Y, {"mean": np.ones(7)})],
    "trees": [({"a": X, "b": X[:, :1]}, {"y": Y})],
    "ragged": [(X, Y), (X[:2], Y[:2])],
    "tuple of two": ((X, Y), (X, Y)),
    "tuple of three": ((X, Y), (X, Y), (X, Y)),
    "batch as a list": [[X, Y]],
    "integers": [(np.ones((4, 2), np.uint8), Y)],
    "bfloat16": [(jnp.ones((4, 2), jnp.bfloat16), Y)],
    "constant number": [(X, Y, 3)],
    "constant key": [(X, Y, jax.random.key(0))],
    "double": [(np.full((4, 2), 1e300), Y)],
    "tuple of lists": ([X, Y], [X, Y]),
}


@pytest.mark.parametrize("batches", SOUND_BATCHES.values(), ids=SOUND_BATCHES)
def test_sound_batches_pass(batches):
    arrays.check_batches(batches)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_are_found_in_every_dtype(dtype, bad):
    array = jnp.ones((3, 2), dtype).at[2, 1].set(bad)
    with pytest.raises(ValueError, match="params: 'a/w' has NaN or infinite"):
        arrays.check_params({"a": {"w": array}})
    with pytest.raises(ValueError, match="NaN or infinite"):
        arrays.check_batches([(array, None)])


def test_traced_weights_pass():
    """Inside jit there is nothing to look at."""
    jax.jit(lambda p: arrays.check_params(p) or p)({"w": X})


def test_an_iterator_is_refused_clearly():
    with pytest.raises((ValueError, TypeError), match="batches must be a sequence"):
        arrays.check_batches(iter([(X, Y)]))
