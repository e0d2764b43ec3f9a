"""Training and evaluation."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.data import datasets as data
from experiments.models import networks, training
from experiments.models.specs import MODELS
from tests.experiments.small import small_spec


def test_evaluation_counts_every_example_once(monkeypatch):
    spec = MODELS["mlp"]
    params, constants = jax.jit(spec.init)(jax.random.key(0))
    inputs, targets = data.digits().test
    outputs = np.asarray(jax.jit(spec.model.predict)(params, inputs))
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


class Small(nn.Module):
    """The parts of ResNet-20, once each: its training step takes long to compile."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(networks._norm(train, "bn1")(networks._conv(4, 3, 1, "conv1")(x)))
        x = networks.Block(6, 2, name="layer1_0")(x, train)
        return nn.Dense(10, name="fc")(x.mean(axis=(1, 2)))


SMALL = small_spec(Small(), (8, 8, 3))


@pytest.fixture(scope="module")
def images():
    """Four images for the small network."""
    inputs = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    return inputs, np.arange(4, dtype=np.int32)


def test_batch_statistics_are_averaged(images):
    _, constants = training.train(SMALL, images, epochs=1, learning_rate=1e-4)
    _, start = jax.eval_shape(SMALL.init, jax.random.key(0))
    assert jax.tree.structure(constants) == jax.tree.structure(start)
    assert not np.allclose(constants["bn1"]["var"], 1)  # where it starts


def test_every_norm_of_resnet20_averages_its_statistics():
    spec = MODELS["resnet20"]

    @jax.jit
    def averaged(inputs):
        params, constants = spec.init(jax.random.key(0))
        variables = {"params": params, "batch_stats": constants}
        _, new = spec.module.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return constants, new["batch_stats"]

    start, new = averaged(np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32))
    assert jax.tree.structure(start) == jax.tree.structure(new)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(new), strict=True):
        assert not np.allclose(before, after, atol=1e-6)


def test_training_on_starts_where_it_is_told_and_keeps_zeros(images):
    params, constants = jax.jit(SMALL.init)(jax.random.key(0))
    masks = flj.make_masks(jax.tree.map(abs, params), 0.7, prunable=SMALL.prunable)
    pruned = flj.apply_masks(params, masks)
    # the first step of AdamW is as long as its rate
    moved, statistics = training.train(
        SMALL, images, epochs=1, start=(pruned, constants), masks=masks, learning_rate=1e-4
    )
    for new, old, mask in zip(*map(jax.tree.leaves, (moved, pruned, masks)), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[~np.asarray(mask)], 0)
        np.testing.assert_allclose(new, old, atol=2e-4)
    assert flj.sparsity(moved, SMALL.prunable) == flj.sparsity(pruned, SMALL.prunable)
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
