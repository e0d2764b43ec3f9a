"""Fisher products and per-example gradients against matrices made of Jacobians."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests import dense


def bernoulli_information(logits):
    p = 1 / (1 + np.exp(-logits))
    return np.diag(p * (1 - p))


def gaussian_information(outputs):
    half = len(outputs) // 2
    scales = np.exp(outputs[half:])
    return np.diag(np.concatenate([1 / scales**2, np.full(half, 2.0)]))


def pair(params, x):
    mean, log_scale = jnp.split(dense.mlp(params, x), 2, axis=1)
    return mean, log_scale


def case(name):
    """A model, its parameters, a batch of 13 examples, and its Fisher in output space."""
    params = dense.mlp_params(jax.random.key(1), (3, 4, 4))
    inputs, labels = dense.classification_batch(jax.random.key(2), 13)
    reals = jax.random.normal(jax.random.key(3), (13, 4))
    return {
        "categorical": (
            dense.categorical_mlp(),
            params,
            (inputs, labels),
            dense.categorical_information,
        ),
        "bernoulli": (
            flj.Model(dense.mlp, flj.likelihoods.bernoulli()),
            params,
            (inputs, (reals > 0).astype(float)),
            bernoulli_information,
        ),
        "known": (
            flj.Model(dense.mlp, flj.likelihoods.gaussian(0.5)),
            params,
            (inputs, reals),
            lambda o: 4 * np.eye(len(o)),
        ),
        "learned": (
            flj.Model(pair, flj.likelihoods.gaussian(None)),
            params,
            (inputs, reals[:, :2]),
            gaussian_information,
        ),
    }[name]


CASES = ("categorical", "bernoulli", "known", "learned")
CASES_AND_CHUNKS = [*((name, None) for name in CASES), ("categorical", 5), ("learned", 5)]


def product_matrix(model, params, batch, **kwargs):
    return dense.matrix_of(
        lambda v: flj.fisher_vector_product(model, params, batch, v, **kwargs), params
    )


@pytest.mark.parametrize("name, chunk", CASES_AND_CHUNKS)
def test_exact_product(x64, name, chunk):
    model, params, batch, information = case(name)
    expected = dense.exact_fisher(model, params, batch, information)
    found = product_matrix(model, params, (batch[0], None), examples_per_chunk=chunk)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("name, chunk", CASES_AND_CHUNKS)
def test_empirical_product(x64, name, chunk):
    model, params, batch, _ = case(name)
    expected = dense.gram(dense.gradients(model, params, batch))
    found = product_matrix(model, params, batch, kind="empirical", examples_per_chunk=chunk)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_sampled_product(x64, name, key):
    """The sampled Fisher is the empirical one at the labels that this key draws."""
    model, params, batch, _ = case(name)
    labels = model.likelihood.sample(key, model.predict(params, batch[0]))
    expected = dense.gram(dense.gradients(model, params, (batch[0], labels)))
    found = product_matrix(model, params, (batch[0], None), kind="sampled", key=key)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_sampled_products_average_to_the_exact_one(key):
    """The quadratic form over 2000 keys, within five standard errors; each chunk draws anew."""
    model, params, batch, _ = case("categorical")
    v = dense.random_like(key, params)

    def form(k=None, kind="exact"):
        fv = flj.fisher_vector_product(
            model, params, batch, v, kind=kind, key=k, examples_per_chunk=5
        )
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, v, fv)))

    sampled = np.asarray(jax.lax.map(lambda k: form(k, "sampled"), jax.random.split(key, 2000)))
    error = abs(sampled.mean() - form())
    assert error < 5 * sampled.std() / np.sqrt(2000)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_a_log_scale_that_all_examples_share(x64, kind):
    """A learned scale of the shape (1,) broadcasts against the means of all examples."""
    inputs = jax.random.normal(jax.random.key(0), (6, 3))
    params = {"kernel": jnp.array([0.5, 1.0, -1.0])[:, None], "log_scale": jnp.array([0.3])}
    targets = jax.random.normal(jax.random.key(1), (6, 1))
    model = flj.Model(
        lambda p, x: (x @ p["kernel"], p["log_scale"]), flj.likelihoods.gaussian(None)
    )
    repeated = flj.Model(
        lambda p, x: (x @ p["kernel"], jnp.broadcast_to(p["log_scale"], (len(x), 1))),
        flj.likelihoods.gaussian(None),
    )
    if kind == "exact":
        expected = dense.exact_fisher(repeated, params, (inputs, None), gaussian_information)
    else:
        expected = dense.gram(dense.gradients(repeated, params, (inputs, targets)))
    found = product_matrix(model, params, (inputs, targets), kind=kind)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("chunk", [None, 5, 100])
def test_per_example_gradients(x64, chunk):
    model, params, batch, _ = case("categorical")
    found = flj.per_example_gradients(model, params, batch, examples_per_chunk=chunk)
    rows = np.stack([dense.ravel(jax.tree.map(lambda x: x[i], found)) for i in range(13)])  # noqa: B023
    np.testing.assert_allclose(rows, dense.gradients(model, params, batch), atol=1e-12)


def test_per_example_gradients_of_sampled_labels(x64, key):
    model, params, (inputs, _), _ = case("categorical")
    found = flj.per_example_gradients(model, params, (inputs, None), labels="sampled", key=key)
    labels = model.likelihood.sample(key, model.predict(params, inputs))
    expected = flj.per_example_gradients(model, params, (inputs, labels))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-14), found, expected)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_curvature_of_ragged_batches_is_that_of_one(x64, kind):
    model, params, (inputs, labels), _ = case("categorical")
    cuts = [(0, 3), (3, 9), (9, 13)]
    parts = flj.curvature(model, [(inputs[a:b], labels[a:b]) for a, b in cuts], kind=kind)
    whole = (inputs, labels)
    assert parts.loss(params) == pytest.approx(float(flj.loss(model, params, whole)), abs=1e-14)
    gradient = jax.grad(lambda p: flj.loss(model, p, whole))(params)
    np.testing.assert_allclose(
        dense.ravel(parts.gradient(params)), dense.ravel(gradient), atol=1e-14
    )
    found = dense.matrix_of(lambda v: parts.product(params, v), params)
    np.testing.assert_allclose(found, product_matrix(model, params, whole, kind=kind), atol=1e-12)


def test_sampled_curvature_keeps_its_labels(x64, key):
    """Conjugate gradients need one fixed, symmetric operator."""
    model, params, batch, _ = case("categorical")
    product = flj.curvature(model, [batch], kind="sampled", key=key).product
    first, second = (dense.matrix_of(lambda v: product(params, v), params) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, first.T, atol=1e-14)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_constants_are_not_sliced(x64, kind):
    """Constants of as many rows as the batch has examples stay whole in every chunk."""
    _, params, (inputs, labels), _ = case("categorical")
    constant = jax.random.normal(jax.random.key(5), (13, 3))

    def predict(params, x, constants):
        return dense.mlp(params, x * constants["scale"].sum(0) / 13)

    model = flj.Model(predict, flj.likelihoods.categorical())
    batch = (inputs, labels, {"scale": constant})
    expected = dense.exact_fisher(model, params, batch)
    if kind == "empirical":
        expected = dense.gram(dense.gradients(model, params, batch))
    for chunk in (None, 5):
        found = product_matrix(model, params, batch, kind=kind, examples_per_chunk=chunk)
        np.testing.assert_allclose(found, expected, atol=1e-10)
    product = flj.curvature(model, [batch, batch], kind=kind).product
    found = dense.matrix_of(lambda v: product(params, v), params)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    rows = flj.per_example_gradients(model, params, batch, examples_per_chunk=5)
    assert jax.tree.leaves(rows)[0].shape[0] == 13


class Weights(NamedTuple):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize(
    "make",
    [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b], Weights],
    ids=["dict", "list", "NamedTuple"],
)
def test_any_pytree(x64, make):
    """Inputs may be a pytree too; leaves come in the tree's order, here first then second."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = make(jax.random.normal(keys[0], (2, 3)), jax.random.normal(keys[1], (3, 4)))

    def predict(p, x):
        first, second = jax.tree.leaves(p)
        return jnp.tanh(x["left"] @ first) * x["right"] @ second

    model = flj.Model(predict, flj.likelihoods.categorical())
    inputs = {
        "left": jax.random.normal(keys[2], (7, 2)),
        "right": jax.random.normal(keys[3], (7, 3)),
    }
    found = product_matrix(model, params, (inputs, None), examples_per_chunk=3)
    expected = dense.exact_fisher(model, params, (inputs, None))
    np.testing.assert_allclose(found, expected, atol=1e-10)
    v = dense.random_like(keys[0], params)
    fv = flj.fisher_vector_product(model, params, (inputs, None), v)
    assert jax.tree.structure(fv) == jax.tree.structure(params)


def test_products_keep_the_dtype():
    model, params, (inputs, _), _ = case("categorical")
    params, inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, inputs))
    fv = flj.fisher_vector_product(model, params, (inputs, None), params, examples_per_chunk=5)
    assert {x.dtype for x in jax.tree.leaves(fv)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"kind": "true"}, "kind must be one of exact, sampled, empirical, got 'true'"),
        ({"kind": "sampled"}, "key must be a random key"),
        ({"kind": "empirical"}, "targets of None"),
        ({"examples_per_chunk": 0}, "examples_per_chunk must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_of_products(kwargs, message):
    model, params, (inputs, _), _ = case("categorical")
    with pytest.raises(ValueError, match=message):
        flj.fisher_vector_product(model, params, (inputs, None), params, **kwargs)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"labels": "exact"}, "labels must be 'empirical' or 'sampled', got 'exact'"),
        ({"labels": "sampled"}, "key must be a random key"),
        ({}, "targets of None"),
    ],
)
def test_bad_arguments_of_per_example_gradients(kwargs, message):
    model, params, (inputs, _), _ = case("categorical")
    with pytest.raises(ValueError, match=message):
        flj.per_example_gradients(model, params, (inputs, None), **kwargs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model, batch: (None, batch), "model must be a fishleg_jax.Model, got None"),
        (lambda model, batch: (model, batch[0]), "batch must be a tuple"),
        (lambda model, batch: (model, (batch[0], batch[1][:-1])), "the same number of examples"),
    ],
)
@pytest.mark.parametrize("function", ["product", "gradients"])
def test_what_is_no_model_or_no_batch_is_refused(function, change, message):
    model, params, batch, _ = case("categorical")
    model, batch = change(model, batch)
    with pytest.raises(ValueError, match=message):
        if function == "product":
            flj.fisher_vector_product(model, params, batch, params)
        else:
            flj.per_example_gradients(model, params, batch)


def test_bad_chunk_of_per_example_gradients():
    model, params, batch, _ = case("categorical")
    with pytest.raises(ValueError, match="examples_per_chunk must be a whole number of at least 1"):
        flj.per_example_gradients(model, params, batch, examples_per_chunk=0)


def test_curvature_without_batches_is_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        flj.curvature(dense.categorical_mlp(), [])
