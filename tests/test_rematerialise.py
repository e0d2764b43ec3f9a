"""Rematerialisation: fewer activations are kept, and no result changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

LAYERS, WIDTH, EXAMPLES = 16, 32, 512
INPUTS = jax.ShapeDtypeStruct((EXAMPLES, WIDTH), jnp.float32)
KERNELS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)


def deep(kernels, x):
    for kernel in kernels:
        x = jax.nn.relu(jnp.tanh(x @ kernel))  # relu: a call with a derivative of its own
    return x


def scanned(checkpoint):
    body = lambda x, kernel: (jnp.tanh(x @ kernel), None)
    body = jax.checkpoint(body) if checkpoint else body
    return flj.Model(lambda ks, x: jax.lax.scan(body, x, ks)[0], flj.likelihoods.gaussian())


MODEL = flj.Model(deep, flj.likelihoods.gaussian())
COMPILED = flj.Model(jax.jit(deep), flj.likelihoods.gaussian())


def kept(model, segments):
    """Bytes that the backward pass gets from the forward one, without weights and inputs."""
    model = model if segments is None else flj.remat(model, segments)

    def residuals(kernels, x):
        return jax.tree.leaves(jax.vjp(lambda ks: model.predict(ks, x), list(kernels))[1])

    found = jax.eval_shape(residuals, KERNELS, INPUTS)
    return sum(4 * x.size for x in found if EXAMPLES in x.shape)


@pytest.mark.parametrize("model", [MODEL, COMPILED], ids=["plain", "compiled"])
def test_only_what_passes_between_segments_is_kept(model):
    one_layer = 4 * EXAMPLES * WIDTH
    assert kept(model, None) >= LAYERS * one_layer
    assert kept(model, 4) <= 4 * one_layer


@pytest.mark.parametrize("segments", [1, 3, pytest.param(100, marks=pytest.mark.slow)])
def test_results_are_the_same(x64, segments, key):
    kernels = list(jax.random.normal(key, (5, 4, 4)))
    inputs, targets = jax.random.normal(key, (2, 7, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def results(model, kernels):
        return (
            jax.value_and_grad(lambda p: flj.loss(model, p, (inputs, targets)))(kernels),
            flj.fisher_vector_product(model, kernels, (inputs, None), kernels),
            flj.per_example_gradients(model, kernels, (inputs, targets)),
        )

    for plain in (MODEL, COMPILED):
        found, expected = (results(m, kernels) for m in (flj.remat(plain, segments), plain))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-13), found, expected)


def test_constants_and_pytrees_and_what_costs_know():
    def predict(params, x, constants):
        return {"out": x["in"] @ params["w"] + constants, "also": constants}

    model = flj.Model(predict, flj.likelihoods.gaussian())
    args = {"w": jnp.ones((3, 2))}, {"in": jnp.ones((4, 3))}, jnp.arange(2.0)
    jax.tree.map(np.testing.assert_array_equal, flj.remat(model).predict(*args), predict(*args))
    batch = (jnp.ones((4, 3)), None)
    linear = flj.Model(lambda p, x: x @ p["w"], flj.likelihoods.gaussian())
    assert flj.weight_costs(flj.remat(linear), args[0], batch)["w"] == 2


def test_a_model_is_cut_once():
    """Models are what compiled functions are found by."""
    assert flj.remat(MODEL, 8) is flj.remat(MODEL) is flj.remat(model=MODEL, segments=8)
    with pytest.raises(ValueError, match="segments must be a whole number of at least 1, got 0"):
        flj.remat(MODEL, 0)


def temporary(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_a_checkpoint_in_the_model_lowers_the_peak():
    """Of gradients and of Fisher products; XLA for the CPU heeds it in loops alone."""

    def peaks(model):
        gradient = jax.grad(lambda ks, x: flj.loss(model, ks, (x, x)))
        product = lambda ks, x: flj.fisher_vector_product(model, ks, (x, None), ks)
        return [temporary(f, KERNELS, INPUTS) for f in (gradient, product)]

    plain, checkpointed = peaks(scanned(False)), peaks(scanned(True))
    activations = 4 * EXAMPLES * WIDTH
    # two arrays a layer, the input and the derivative of tanh, or the input alone
    assert all(p - c > 0.7 * LAYERS * activations for p, c in zip(plain, checkpointed, strict=True))


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="XLA for the CPU takes it out again")
def test_segments_lower_the_peak():
    gradient = lambda m: jax.grad(lambda ks, x: flj.loss(m, list(ks), (x, x)))
    with_segments = temporary(gradient(flj.remat(MODEL, 4)), KERNELS, INPUTS)
    assert with_segments < 0.7 * temporary(gradient(MODEL), KERNELS, INPUTS)
