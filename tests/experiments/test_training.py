"""Training and evaluation."""

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments import data, training
from experiments.models import MODELS


def test_evaluation_counts_every_example_once(monkeypatch):
    spec = MODELS["mlp"]
    params, constants = spec.init(jax.random.key(0))
    inputs, targets = data.digits().test
    outputs = np.asarray(spec.model.predict(params, inputs))
    monkeypatch.setattr(training, "EVALUATION_BATCH", 300)  # does not divide 500
    accuracy, loss = training.evaluate(spec.model, params, (inputs, targets), constants)
    assert accuracy == pytest.approx(100 * np.mean(outputs.argmax(1) == targets))
    losses = spec.model.likelihood.negative_log_likelihood(outputs, targets)
    assert loss == pytest.approx(float(losses.mean()), rel=1e-5)


def test_training_learns_and_repeats():
    spec, split = MODELS["mlp"], data.digits()
    params, constants = training.train(spec, split.train, epochs=3, seed=1)
    assert training.evaluate(spec.model, params, split.test, constants)[0] > 80
    again, _ = training.train(spec, split.train, epochs=3, seed=1)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_resnet20_averages_batch_statistics():
    spec = MODELS["resnet20"]
    inputs = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    _, constants = training.train(spec, (inputs, np.arange(4, dtype=np.int32)), epochs=1)
    _, start = jax.eval_shape(spec.init, jax.random.key(0))
    assert jax.tree.structure(constants) == jax.tree.structure(start)
    assert not np.allclose(constants["bn1"]["var"], 1)  # where it starts


def test_training_on_starts_where_it_is_told_and_keeps_zeros():
    spec = MODELS["resnet20"]
    inputs = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    images = inputs, np.arange(4, dtype=np.int32)
    params, constants = jax.jit(spec.init)(jax.random.key(0))
    masks = flj.make_masks(jax.tree.map(abs, params), 0.7, prunable=spec.prunable)
    pruned = flj.apply_masks(params, masks)
    # the first step of AdamW is as long as its rate
    moved, statistics = training.train(
        spec, images, epochs=1, start=(pruned, constants), masks=masks, learning_rate=1e-4
    )
    for new, old, mask in zip(*map(jax.tree.leaves, (moved, pruned, masks)), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[~np.asarray(mask)], 0)
        np.testing.assert_allclose(new, old, atol=2e-4)
    assert flj.sparsity(moved, spec.prunable) == flj.sparsity(pruned, spec.prunable)
    assert not np.allclose(statistics["bn1"]["var"], constants["bn1"]["var"])


def test_no_gradient_of_a_pruned_weight_gets_into_the_moments():
    spec = MODELS["mlp"]
    images = tuple(array[:64] for array in data.digits().train)
    params, constants = jax.jit(spec.init)(jax.random.key(0))
    masks = flj.make_masks(jax.tree.map(abs, params), 0.7)
    params = flj.apply_masks(params, masks)
    optimizer, step = training._make_step(spec, 1e-2, 10)
    state = optimizer.init(params)
    for _ in range(3):
        params, constants, state = step(params, constants, state, masks, *images)
        for tree in (params, state[0].mu, state[0].nu):
            jax.tree.map(lambda x, m: np.testing.assert_array_equal(x[~m], 0), tree, masks)
    assert flj.sparsity(params) == pytest.approx(0.7, abs=1e-4)
