"""Weights into noisy cells and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax import storage

EXACT = storage.gaussian(0.0)
CODINGS = [
    storage.Coding(signs, zeros, ranges)
    for signs in (True, False)
    for zeros in (True, False)
    for ranges in ("leaf", "network")
]
PARAMS = {"w": jnp.array([[0.5, -2.0], [0.0, 1.0]]), "b": jnp.array([0.1, -0.2, 0.0])}


# XLA for the CPU takes subnormal numbers for zero
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def round_trip(params, cells, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed))
    return storage.read(storage.write(params, cells, keys[0], **options), keys[1])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(FLOATS, min_size=5, max_size=5),  # one shape compiles once
    st.sampled_from(CODINGS),
    st.integers(1, 5),
)
def test_without_noise_storage_is_exact(values, coding, cells):
    params = {"w": jnp.asarray(values, jnp.float32), "b": jnp.asarray(values[:1], jnp.bfloat16)}
    found = round_trip(params, cells, cell=EXACT, coding=coding)
    for name, leaf in params.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf)


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_noise_has_the_variance_that_is_stated(coding):
    """Of weights in the middle of a range, which reads are not clipped to."""
    params = {"w": jnp.tile(jnp.array([0.5, -0.4, 4.0]), (4000, 1)), "v": jnp.full(4000, 0.2)}
    cell, cells = storage.gaussian(0.03, read=0.04), 4
    found = round_trip(params, cells, cell=cell, coding=coding)
    stated = storage.variances(params, cell=cell, coding=coding)["w"][0, :2] / cells
    top = 4.0 * (1 if coding.signs else 2)
    np.testing.assert_allclose(stated, (0.05 * top) ** 2 / cells, rtol=1e-5)
    measured = np.var(np.asarray(found["w"] - params["w"])[:, :2], axis=0)
    np.testing.assert_allclose(measured, stated, rtol=0.1)  # standard error 2 %
    top = {"leaf": params["v"][0], "network": 4.0}[coding.ranges]
    assert jnp.abs(found["v"]).max() <= top  # reads are clipped to the range
    assert found["v"].min() < 0.2 and (coding.ranges == "leaf" or found["v"].max() > 0.2)


def test_protected_signs_and_zeros_survive_any_noise():
    loud = storage.gaussian(0.5)
    found = round_trip(PARAMS, 1, cell=loud)
    for before, after in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(found), strict=True):
        assert (before * after >= 0).all()
        assert (after[before == 0] == 0).all()
        assert float(jnp.abs(after).max()) <= float(jnp.abs(before).max())
        assert not jnp.array_equal(before, after)
    zeros = jnp.zeros(200).at[0].set(1.0)
    assert not round_trip(zeros, 1, cell=loud)[1:].any()
    open_zeros = round_trip(zeros, 1, cell=loud, coding=storage.Coding(zeros=False))
    assert 50 < (open_zeros[1:] != 0).sum() < 150  # every other read is below the range
    small = jnp.full(200, 0.01).at[0].set(1.0)
    assert (round_trip(small, 1, cell=loud) >= 0).all()
    open_signs = round_trip(small, 1, cell=loud, coding=storage.Coding(signs=False))
    assert 50 < (open_signs[1:] < 0).sum() < 150


def test_writes_stay_and_reads_vary():
    cell = storage.gaussian(0.05, read=0.05)
    stored = storage.write(PARAMS, 2, jax.random.key(0), cell=cell)
    one, again, other = (storage.read(stored, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one["w"], again["w"])
    assert not jnp.array_equal(one["w"], other["w"])
    quiet = storage.write(PARAMS, 2, jax.random.key(0), cell=storage.gaussian(0.05))
    np.testing.assert_array_equal(
        storage.read(quiet, jax.random.key(1))["w"], storage.read(quiet, jax.random.key(2))["w"]
    )


def test_more_cells_make_less_noise_and_jit_changes_nothing():
    params = jnp.full(2000, 0.5).at[0].set(1.0)
    cells = jnp.where(jnp.arange(2000) < 1000, 1, 9)
    options = {"cell": storage.gaussian(0.05)}
    found = round_trip(params, cells, **options)
    compiled = jax.jit(lambda p, n: round_trip(p, n, **options))(params, cells)
    np.testing.assert_allclose(found, compiled, rtol=1e-6)
    few, many = (np.std(np.asarray(x[1:] - 0.5)) for x in (found[:1000], found[1000:]))
    np.testing.assert_allclose(few / many, 3, rtol=0.15)


def test_phase_change_memory_is_that_of_its_formulas():
    """Coefficients as published, in microsiemens; a read after one second."""
    conductance = np.linspace(0.01, 1, 25)
    write = np.maximum(-1.1731 * conductance**2 + 1.9650 * conductance + 0.2635, 0) / 25
    noise = np.minimum(0.0088 / conductance**0.65, 0.2)
    read = conductance * noise * np.sqrt(np.log((1 + 250e-9) / (2 * 250e-9)))
    found = storage.pcm().variance(jnp.asarray(conductance))
    np.testing.assert_allclose(found, write**2 + read**2, rtol=1e-4)
    assert storage.pcm() is storage.pcm() and storage.pcm(60.0) is not storage.pcm()
    assert float(storage.pcm(60.0).read(0.5)) > float(storage.pcm().read(0.5))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda key: storage.write(PARAMS, 0, key), "cells must be a whole number of at least 1"),
        (lambda key: storage.write(PARAMS, {"w": 1}, key), "cells must have the structure"),
        (
            lambda key: storage.write(PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), key),
            "'b' must have an integer type",
        ),
        (
            lambda key: storage.write(
                PARAMS, jax.tree.map(lambda w: jnp.zeros(w.shape, int), PARAMS), key
            ),
            "'b' must have at least 1 for every weight",
        ),
        (lambda key: storage.write(PARAMS, 1, key, cell=3), "cell must be a Cell"),
        (lambda key: storage.write(PARAMS, 1, key, coding=3), "coding must be a flj.storage.Codin"),
        (
            lambda key: storage.write(PARAMS, 1, key, coding=storage.Coding(ranges="row")),
            "coding.ranges must be one of leaf, network, got 'row'",
        ),
        (lambda key: storage.write({"w": jnp.array([jnp.nan])}, 1, key), "NaN or infinite"),
        (lambda key: storage.read(PARAMS, key), "stored must be a Stored"),
        (lambda key: storage.gaussian(-1.0), "spread must be a finite number of at least 0"),
        (lambda key: storage.pcm(0.0), "seconds must be at least"),
    ],
)
def test_bad_arguments_are_refused(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)


def test_storage_is_a_public_room():
    assert flj.storage is storage and repr(storage.pcm()).startswith("Cell(pcm")
