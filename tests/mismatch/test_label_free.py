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


PADDING = {"signed": (-100, np.int32), "unsigned": (255, np.uint8)}


@pytest.mark.parametrize("label, dtype", PADDING.values(), ids=PADDING)
def test_padding_stays_out_of_losses_and_fishers(label, dtype, key):
    """As without it: the first three of five tokens."""
    plain, weights, _ = network("categorical", key)
    model = flj.Model(plain.predict, flj.likelihoods.categorical(ignore=label))
    inputs = jax.random.normal(jax.random.key(1), (8, 5, 6))
    labels = np.zeros((8, 5), dtype)
    labels[:, 3:] = label
    matched, (batch,) = flj.label_free(model, weights, [(inputs, labels)])
    short, (expected,) = flj.label_free(plain, weights, [(inputs[:, :3], None)])
    np.testing.assert_allclose(batch[1][:, :3], expected[1], rtol=1e-6)
    assert not batch[1][:, 3:].any()

    student, vector = weights.at[0].set(0), jax.random.normal(jax.random.key(2), weights.shape)
    for of in (
        lambda model, batch: flj.loss(model, student, batch),
        lambda model, batch: jax.grad(lambda w: flj.loss(model, w, batch))(student),
        lambda model, batch: flj.fisher_vector_product(model, student, batch, vector),
        lambda model, batch: flj.fisher_vector_product(
            model, student, batch, vector, kind="empirical"
        ),
    ):
        np.testing.assert_allclose(of(matched, batch), of(short, expected), rtol=1e-4, atol=1e-6)
    # sampled targets and random cotangents leave padding out too
    outputs = matched.predict(student, inputs)
    likelihood = matched.likelihood
    drawn = likelihood.sample(key, outputs, batch[1])
    assert (drawn.sum(axis=-1) == (labels != label)).all()
    assert not likelihood.root(outputs, jnp.ones_like(outputs), batch[1])[:, 3:].any()
    sampled = flj.fisher_vector_product(matched, student, batch, vector, kind="sampled", key=key)
    assert jnp.isfinite(sampled).all()
    # without labels no output counts as padding
    whole, found = flj.label_free(model, weights, [(inputs, None)])
    same, again = flj.label_free(plain, weights, [(inputs, None)])
    losses = flj.loss(whole, student, found[0]), flj.loss(same, student, again[0])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_padded_model_is_pruned_without_labels(key):
    plain, weights, _ = network("categorical", key)
    model = flj.Model(plain.predict, flj.likelihoods.categorical(ignore=-100))
    inputs = jax.random.normal(jax.random.key(1), (2, 20, 5, 6))
    labels = np.where(np.arange(5) < 3, 0, -100) * np.ones((20, 1), int)
    # padded tokens do not count, whatever they are
    results = []
    for factor in (1, 100):
        batches = [(x.at[:, 3:].multiply(factor), labels) for x in inputs]
        matched, found = flj.label_free(model, weights, batches)
        results.append(
            flj.prune_one_shot(
                matched, weights, flj.inverse.kfac(matched), found, sparsity=0.5, stages=1
            ).params
        )
    assert flj.sparsity(results[0]) == 0.5
    np.testing.assert_allclose(*results, atol=1e-5)


def test_bad_arguments_are_refused(key):
    model, weights, batches = network("categorical", key)
    other = flj.Model(model.predict, flj.likelihoods.gaussian(2.0))
    with pytest.raises(ValueError, match="model must have the likelihood"):
        flj.label_free(other, weights, batches)
    padded = flj.Model(model.predict, flj.likelihoods.categorical(ignore=-100))
    with pytest.raises(ValueError, match="or -100 for those to ignore, got -1"):
        flj.label_free(padded, weights, [(batches[0][0], np.full(30, -1))])
    with pytest.raises(ValueError, match="batches must be a sequence"):
        flj.label_free(model, weights, batches[0])
    matched, found = flj.label_free(model, weights, batches)
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got 2"):
        flj.loss(matched, weights, (found[0][0], found[0][1].at[0, 0].set(2.0)))
