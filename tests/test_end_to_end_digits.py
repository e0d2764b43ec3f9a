"""Real images: FishLeg with its defaults against magnitude on a small network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import dense

SEEDS = (0, 1, 2)
MODEL = dense.categorical_mlp()


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = np.float32(images[order] / 16), labels[order]
    return (images[:1300], labels[:1300]), (images[1300:], labels[1300:])


OPTIMIZER = optax.adam(3e-3)


@jax.jit
def step(params, state, batch):
    gradient = jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def trained(train, seed):
    """Twenty epochs of Adam."""
    params = dense.mlp_params(jax.random.key(seed), (64, 32, 10))
    params = jax.tree.map(lambda p: p / 4, params)

    state, rng = OPTIMIZER.init(params), np.random.default_rng(seed)
    for _ in range(20):
        for chosen in rng.permutation(1300).reshape(-1, 50):
            params, state = step(params, state, (train[0][chosen], train[1][chosen]))
    return params


def accuracy(params, test):
    return float(np.mean(np.argmax(MODEL.predict(params, jnp.asarray(test[0])), 1) == test[1]))


@pytest.mark.slow
def test_fishleg_is_at_least_as_good_as_magnitude(digits):
    train, test = digits
    batches = [tuple(x[i : i + 260] for x in train) for i in range(0, 1300, 260)]
    learned = flj.inverse.fishleg(MODEL)
    accuracies = {"dense": [], "fishleg": [], "magnitude": []}
    for seed in SEEDS:
        params = trained(train, seed)
        accuracies["dense"].append(accuracy(params, test))
        for name, estimator in (("fishleg", learned), ("magnitude", flj.inverse.identity())):
            result = flj.prune_one_shot(
                MODEL, params, estimator, batches, sparsity=0.8, key=jax.random.key(seed)
            )
            accuracies[name].append(accuracy(result.params, test))
            weights = 64 * 32 + 32 * 10
            zeros = sum(int((layer["kernel"] == 0.0).sum()) for layer in result.params.values())
            assert zeros == int(0.8 * weights)
            assert flj.sparsity(result.params) == zeros / weights
            if name == "fishleg":
                guard = result.state.guard
                assert guard.back_offs == 0 and guard.skipped == 0
    medians = {name: np.median(values) for name, values in accuracies.items()}
    assert medians["dense"] > 0.9
    assert medians["fishleg"] >= medians["magnitude"]
