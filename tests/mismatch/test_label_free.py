"""A network's own outputs as targets: what the loss, its gradient and a pruning see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

KINDS = ("categorical", "bernoulli", "gaussian")


def network(kind, key):
    model = flj.Model(lambda w, x: x @ w, getattr(flj.likelihoods, kind)())
    weights = jax.random.normal(key, (6, 4))
    inputs = jax.random.normal(jax.random.key(1), (2, 30, 6))
    return model, weights, [(x, None) for x in inputs]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_zero_at_the_dense_weights(kind, key):
    model, weights, batches = network(kind, key)
    matched, found = flj.label_free(model, weights, batches)
    assert matched.predict is model.predict and len(found) == 2
    gradient = jax.grad(lambda w: flj.loss(matched, w, found[0]))
    np.testing.assert_allclose(gradient(weights), 0, atol=1e-6)
    assert float(jnp.abs(gradient(weights.at[0].set(0))).max()) > 1e-2


def test_the_loss_is_the_divergence_from_the_teacher(key):
    model, weights, batches = network("categorical", key)
    matched, found = flj.label_free(model, weights, batches)
    student = weights.at[0].set(0)
    p, q = (jax.nn.softmax(batches[0][0] @ w) for w in (weights, student))
    divergence = (p * (jnp.log(p) - jnp.log(q))).sum(axis=1)
    difference = flj.losses(matched, student, found[0]) - flj.losses(matched, weights, found[0])
    np.testing.assert_allclose(difference, divergence, atol=1e-5)


def test_the_fisher_is_that_of_labels(key):
    model, weights, batches = network("categorical", key)
    matched, found = flj.label_free(model, weights, batches)
    vector = jax.random.normal(jax.random.key(2), weights.shape)
    expected = flj.fisher_vector_product(model, weights, batches[0], vector)
    product = flj.fisher_vector_product(matched, weights, found[0], vector)
    np.testing.assert_allclose(product, expected, rtol=1e-6)
    sampled = matched.likelihood.sample(key, jnp.zeros((5, 4)))
    assert sampled.shape == (5, 4) and (sampled.sum(axis=1) == 1).all()


def test_one_shot_pruning_takes_it(key):
    model, weights, batches = network("categorical", key)
    matched, found = flj.label_free(model, weights, batches)
    result = flj.prune_one_shot(
        matched, weights, flj.inverse.diagonal(matched), found, sparsity=0.5, stages=1
    )
    assert flj.sparsity(result.params) == 0.5
    report = flj.disagreement((model, weights), (model, result.params), batches)
    assert 0 < report.mismatches < 30


def test_bad_arguments_are_refused(key):
    model, weights, batches = network("categorical", key)
    padded = flj.Model(model.predict, flj.likelihoods.categorical(ignore=-100))
    with pytest.raises(ValueError, match="model must have the likelihood"):
        flj.label_free(padded, weights, batches)
    with pytest.raises(ValueError, match="batches must be a sequence"):
        flj.label_free(model, weights, batches[0])
    matched, found = flj.label_free(model, weights, batches)
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got 2"):
        flj.loss(matched, weights, (found[0][0], found[0][1].at[0, 0].set(2.0)))
