"""Outputs of another dtype than the weights: bfloat16, float16, and float64 of float32 weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import dense
from tests.marks import some_slow

KINDS = ("exact", "sampled", "empirical")
LIKELIHOODS = {
    "categorical": flj.likelihoods.categorical(),
    "bernoulli": flj.likelihoods.bernoulli(),
    "gaussian": flj.likelihoods.gaussian(0.5),
    "learned": flj.likelihoods.gaussian(None),
}
# the outputs' dtype and the inputs': float64 inputs make float64 outputs of float32 weights
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64 inputs": None}


@functools.cache
def model_of(name, dtype):
    """A linear layer that computes in a dtype, as flax's `nn.Dense(4, dtype=dtype)` does."""

    def predict(params, x):
        kernel, bias = params["kernel"], params["bias"]
        if dtype is not None:
            x, kernel, bias = x.astype(dtype), kernel.astype(dtype), bias.astype(dtype)
        out = x @ kernel + bias
        return (out[:, :2], out[:, 2:]) if name == "learned" else out

    return flj.Model(predict, LIKELIHOODS[name])


@functools.cache
def batch_of(name, inputs_dtype=None):
    """A batch of 12 examples; its float32 numbers are exact in bfloat16."""
    reals = jnp.round(4 * jax.random.normal(jax.random.key(1), (12, 4))) / 4
    inputs = jnp.round(4 * jax.random.normal(jax.random.key(0), (12, 3))) / 4
    targets = {
        "categorical": jnp.arange(12) % 4,
        "bernoulli": (reals > 0).astype(jnp.float32),
        "gaussian": reals,
        "learned": reals[:, :2],
    }[name]
    return inputs.astype(inputs_dtype or jnp.float32), targets


def weights():
    kernel = jax.random.normal(jax.random.key(2), (3, 4), jnp.float32)
    return {"kernel": 0.5 * kernel, "bias": jnp.full((4,), 0.25, jnp.float32)}


def dtypes_of(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", DTYPES)
# two go through all combinations
@pytest.mark.parametrize("name", some_slow(LIKELIHOODS, lambda name: name in [*LIKELIHOODS][2:]))
def test_an_update_of_fishleg_takes_them(name, dtype):
    """Of every kind, in one piece and in chunks; the state keeps its dtypes.  Traced alone.

    Half of the combinations each, so that two likelihoods go through every one with each dtype.
    """
    double = dtype == "float64 inputs"
    with jax.enable_x64(double):
        params, model = weights(), model_of(name, DTYPES[dtype])
        batch, states = batch_of(name, jnp.float64 if double else None), {}
        ways = itertools.product(enumerate(KINDS), (None, 5), (True, False))
        half = list(LIKELIHOODS).index(name)
        for (number, kind), chunk, learn in ways:
            if (half + number + (chunk is None) + learn) % 2:
                continue
            estimator = flj.inverse.fishleg(
                model, 0.1, kind=kind, learn=learn, start=2, updates=4, examples_per_chunk=chunk
            )
            if learn not in states:  # on which alone a first state depends
                states[learn] = jax.eval_shape(estimator.init, params)
            new = jax.eval_shape(estimator.update, states[learn], params, batch, jax.random.key(0))
            assert dtypes_of(new) == dtypes_of(states[learn])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_losses_are_those_of_the_same_outputs_in_float32(name):
    batch, params = batch_of(name), weights()
    for dtype in (jnp.bfloat16, jnp.float16):
        model = model_of(name, dtype)
        outputs = model.predict(params, batch[0])
        assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
        likelihood = model.likelihood
        expected = likelihood.negative_log_likelihood(wide, batch[1])
        for found in (
            flj.losses(model, params, batch),
            likelihood.negative_log_likelihood(outputs, batch[1]),
        ):
            assert found.dtype == jnp.float32
            np.testing.assert_array_equal(found, expected)
        product = likelihood.fisher(outputs, outputs)
        assert dtypes_of(product) == dtypes_of(outputs)
        expected = likelihood.fisher(wide, wide)
        eps = float(jnp.finfo(dtype).eps)
        for x, y in zip(jax.tree.leaves(product), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_products_are_close_to_those_of_the_float32_network(name, kind, key):
    """Within a few roundings of bfloat16, 0.4 % each, of the float32 network's product."""
    params, batch = weights(), batch_of(name)
    v = dense.random_like(key, params)
    narrow = model_of(name, jnp.bfloat16)
    targets = batch[1]
    if kind == "sampled":  # the labels that the one draws, for both
        outputs = jax.tree.map(lambda x: x.astype(jnp.float32), narrow.predict(params, batch[0]))
        targets = narrow.likelihood.sample(key, outputs)
        expected = flj.fisher_vector_product(
            model_of(name, jnp.float32), params, (batch[0], targets), v, kind="empirical"
        )
    else:
        expected = flj.fisher_vector_product(
            model_of(name, jnp.float32), params, batch, v, kind=kind
        )
    found = flj.fisher_vector_product(narrow, params, batch, v, kind=kind, key=key)
    assert dtypes_of(found) == [jnp.dtype(jnp.float32)] * 2
    found, expected = dense.ravel(found), dense.ravel(expected)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["categorical", "learned"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_float32_weights_with_float64_inputs_against_dense_algebra(x64, name, kind):
    params, model, batch = weights(), model_of(name, None), batch_of(name, jnp.float64)
    product = functools.partial(flj.fisher_vector_product, model, params, batch, kind=kind)
    found = dense.matrix_of(product, params)
    double = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    if kind == "empirical":
        expected = dense.gram(dense.gradients(model, double, batch))
    else:
        information = dense.categorical_information
        if name == "learned":
            information = lambda o: np.diag(np.r_[np.exp(-2 * o[2:]), 2, 2])  # noqa: E731
        expected = dense.exact_fisher(model, double, batch, information)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["categorical", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_one_shot_with_a_group_update(name):
    """FishLeg and exact products of a bfloat16 network: as much pruned, and a loss as low."""
    params, batch = weights(), batch_of(name)
    losses = []
    for dtype in (jnp.bfloat16, jnp.float32):
        model = model_of(name, dtype)
        estimator = flj.inverse.fishleg(model, 0.1, learn=True, start=4, updates=6)
        result = flj.prune_one_shot(
            model,
            params,
            estimator,
            [batch],
            sparsity=0.5,
            held_out=[batch],
            compensation=flj.compensation.group(),
        )
        assert int((~result.masks["kernel"]).sum()) == 6 and result.stopped is None
        assert dtypes_of(result.params) == [jnp.dtype(jnp.float32)] * 2
        losses.append(float(flj.loss(model, result.params, batch)))
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("name", ["categorical", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_a_chain_prunes_them(name):
    params, batch, model = weights(), batch_of(name), model_of(name, jnp.bfloat16)
    prune = flj.fishleg_prune(model, flj.schedules.cubic(0.5, begin=33, end=36), mask_every=3)
    tx = optax.chain(optax.sgd(1e-3), prune)

    @jax.jit
    def step(_, carry):
        params, state = carry
        gradient = jax.grad(lambda p: flj.loss(model, p, batch))(params)
        updates, state = tx.update(gradient, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    pruned, state = jax.lax.fori_loop(0, 40, step, (params, tx.init(params)))
    assert int((pruned["kernel"] == 0).sum()) == 6 and flj.check(state).ok
    assert np.isfinite(dense.ravel(pruned)).all()


def test_peak_memory_takes_them():
    estimator = flj.inverse.fishleg(
        model_of("categorical", jnp.bfloat16), 0.1, learn=True, start=2, updates=4
    )
    found = flj.peak_memory(estimator, weights(), batch_of("categorical"))
    assert found.state > 0 and found.peak >= found.state


def test_what_a_likelihood_returns_in_another_dtype_is_cast(key):
    """A likelihood of a user's own, whose numbers are bfloat16 whatever its outputs are."""
    gaussian = flj.likelihoods.gaussian()
    low = lambda function: lambda *args: function(*args).astype(jnp.bfloat16)
    likelihood = flj.likelihoods.Likelihood(
        low(gaussian.negative_log_likelihood), gaussian.sample, low(gaussian.fisher)
    )
    params, batch = weights(), batch_of("gaussian")
    model, same = (flj.Model(model_of("gaussian", None).predict, x) for x in (likelihood, gaussian))
    v = dense.random_like(key, params)
    for kind in KINDS:
        found = flj.fisher_vector_product(model, params, batch, v, kind=kind, key=key)
        expected = flj.fisher_vector_product(same, params, batch, v, kind=kind, key=key)
        found, expected = dense.ravel(found), dense.ravel(expected)
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_weights_of_several_dtypes_keep_theirs(x64):
    """A probe in the widest of the weights' dtypes; every product in that of its leaf."""
    params = {"kernel": jnp.ones((2, 3), jnp.float32), "bias": jnp.ones(3, jnp.float64)}
    model = flj.Model(lambda p, x: x @ p["kernel"] + p["bias"], LIKELIHOODS["categorical"])
    batch = jnp.ones((4, 2), jnp.float32), jnp.zeros(4, int)
    estimator = flj.inverse.fishleg(model, 0.1, learn=True, start=2, updates=4)
    state = jax.eval_shape(estimator.init, params)
    new = jax.eval_shape(estimator.update, state, params, batch, jax.random.key(0))
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]
