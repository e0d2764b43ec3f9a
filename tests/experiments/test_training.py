"""Training and evaluation."""

import jax
import numpy as np
import pytest

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
