"""Methods by name, and their shares of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.estimates import methods
from experiments.models.specs import MODELS


@pytest.mark.parametrize(
    "examples, gradients, expected",
    [
        (1280, None, (1000, 1000)),
        (16_000, None, (16_000, 1000)),
        (8192, None, (8000, 1000)),
        (50, None, (50, 50)),
        (65, 30, (60, 30)),
        (997, 997, (997, 997)),
    ],
)
def test_all_gradients_are_of_as_many_images(examples, gradients, expected):
    part = methods.share(examples, gradients)
    assert tuple(part) == expected
    assert part.each * part.gradients == part.examples


@pytest.mark.parametrize(
    "examples, gradients, expected",
    [
        # means of so many images, single images, and the model's usual 128
        (1000, 1000, (100, 100, 125)),
        (16_000, 1000, (1600, 100, 128)),
        (60, 30, (60, 60, 60)),
        (997, 997, (100, 100, 128)),  # a prime: the last batch is smaller
    ],
)
def test_batches_are_equal_where_they_can_be(examples, gradients, expected):
    part = methods.Share(examples, gradients)
    sizes = [methods.batch_size(name, part, 128) for name in ("mfac", "kfac", "fishleg")]
    assert tuple(sizes) == expected


@pytest.mark.parametrize("gradients", [2, 3, 251, 502, 1000])
def test_halves_are_of_equal_batches(gradients):
    half = methods.half(methods.Share(3 * gradients, gradients))
    assert half.each == 3
    assert 0.98 * gradients - 1 <= 2 * half.gradients <= gradients
    assert half.examples % methods.batch_size("woodfisher", half, 128) == 0


def test_settings_are_the_librarys_unless_given():
    given = {"damping": None, "gradients": 20, "window": 20, "labels": None, "block_size": "leaf"}
    assert methods.settings_of("magnitude", **given) == {}
    assert methods.settings_of("kfac", **given) == {"damping": 1e-2, "labels": "sampled"}
    assert methods.settings_of("mfac", **given) == {
        "damping": 1e-5,
        "labels": "empirical",
        "block_size": "leaf",
        "examples_per_gradient": 1,
        "window": 20,
    }
    assert methods.settings_of("fishleg_start", **given) == {"damping": None, "learn": False}


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "magnitude"])
def test_chunks_and_remat_change_no_estimate(method):
    model = flj.Model(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w.T), flj.likelihoods.gaussian())
    params = jax.random.normal(jax.random.key(0), (4, 3))
    inputs = jax.random.normal(jax.random.key(1), (12, 4))
    batch, key = (inputs, jnp.sin(inputs)), jax.random.key(2)
    fits = []
    for used, chunk in ((model, None), (flj.remat(model, 2), 5)):
        estimator = methods.make_estimator(method, used, damping=0.5, examples_per_chunk=chunk)
        update, state = jax.jit(estimator.update), estimator.init(params)
        for i in range(3):
            state = update(state, params, batch, jax.random.fold_in(key, i))
        fits.append(jax.tree.leaves(state))
    for found, expected in zip(*fits, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_are_told_only_where_they_are_given():
    assert methods.settings_of("kfac", examples_per_chunk=8)["examples_per_chunk"] == 8
    assert "examples_per_chunk" not in methods.settings_of("kfac", examples_per_chunk=None)
    assert methods.settings_of("magnitude", examples_per_chunk=8) == {}


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_makes_an_estimate(method):
    estimator = methods.make_estimator(method, MODELS["mlp"].model, damping=0.5, updates=4)
    state = jax.eval_shape(estimator.init, {"kernel": jnp.ones((3, 2))})
    assert estimator.updates in (None, 0, 4, 256)
    assert hasattr(state, "damping") or method == "magnitude"
