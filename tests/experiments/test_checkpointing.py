"""Checkpoints: what is read is what was written, and half of one is none."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.running.checkpointing import Checkpoints


class State(NamedTuple):
    count: jax.Array
    nothing: tuple
    empty: jax.Array
    key: jax.Array
    weights: dict


def state(count):
    weights = {"a/b": jnp.full((2, 3), count + 0.1, jnp.bfloat16), "mask": jnp.array([True, False])}
    return State(jnp.int32(count), (), jnp.zeros((0, 3)), jax.random.key(count), weights)


def raw(tree):
    def bits(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [bits(x) for x in jax.tree.leaves(tree)]


def test_the_newest_is_read_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path / "new") as kept:
        assert kept.restore(state(0)) is None
        for step in (3, 5, 8):
            kept.save(step, state(step))
    with Checkpoints(tmp_path / "new") as kept:
        step, found = kept.restore(state(0))
    assert step == 8 and jax.tree.structure(found) == jax.tree.structure(state(0))
    for x, y in zip(raw(found), raw(state(8)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert len(list((tmp_path / "new").iterdir())) == 2  # the others are gone


def test_one_that_was_being_written_is_none(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(3, state(3))
        kept.save(5, state(5))
    # what a killed run leaves behind
    (tmp_path / "5").rename(tmp_path / "5.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as kept:
        assert kept.restore(state(0))[0] == 3
        kept.save(5, state(5))
        assert kept.restore(state(0))[0] == 5


def test_another_structure_is_refused(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(3, state(3))
        with pytest.raises(ValueError, match="structures do not match"):
            kept.restore({"weights": jnp.zeros(2)})
