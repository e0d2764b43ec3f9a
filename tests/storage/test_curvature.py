"""The Fisher at noisy weights: against dense algebra, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax import storage

CELL = storage.gaussian(0.3)
MODEL = flj.Model(lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"], flj.likelihoods.categorical())
EMPIRICAL = flj.inverse.diagonal(MODEL, labels="empirical")


def problem(seed, scale=1.0, examples=24, width=6):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "in": scale * jax.random.normal(keys[0], (4, width)),
        "out": scale * jax.random.normal(keys[1], (width, 3)),
    }
    inputs = jax.random.normal(keys[2], (examples, 4))
    return params, inputs, MODEL.predict(params, inputs).argmax(axis=1)


def dense(params, inputs, labels):
    """Mean squared gradient of single examples, one at a time in float64."""
    wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
    squares = [
        jax.tree.map(jnp.square, jax.grad(lambda w, b=batch: flj.loss(MODEL, w, b))(wide))
        for batch in (
            (jnp.asarray(inputs[i : i + 1], jnp.float64), labels[i : i + 1])
            for i in range(len(inputs))
        )
    ]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *squares)


def close(found, wanted, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9), found, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_mean_of_dense_diagonals_at_the_weights_that_are_read(seed):
    params, inputs, labels = problem(seed)
    batches = [(inputs[:8], labels[:8]), (inputs[8:], labels[8:])]
    key = jax.random.key(seed + 10)
    found = storage.fisher_under_noise(EMPIRICAL, params, batches, 2, key=key, cell=CELL)
    with jax.enable_x64():
        parts = []
        for i, batch in enumerate(batches):
            writing, reading, _ = jax.random.split(jax.random.fold_in(key, i), 3)
            noisy = storage.read(storage.write(params, 2, writing, cell=CELL), reading)
            assert not np.allclose(noisy["in"], params["in"])
            parts.append(dense(noisy, *batch))
    close(found, jax.tree.map(lambda a, b: (8 * a + 16 * b) / 24, *parts))


def test_without_noise_it_is_the_fit_at_the_weights():
    params, *batch = problem(3)
    exact = storage.gaussian(0.0)
    key = jax.random.key(0)
    found = storage.fisher_under_noise(EMPIRICAL, params, [tuple(batch)], 1, key=key, cell=exact)
    state = flj.fit(EMPIRICAL, params, [tuple(batch)], key=key)
    close(found, EMPIRICAL.fisher_diagonal(state, params))


@jax.jit
def losses(params, allotted, held):
    """Loss after a write and a read, for a hundred draws of the noise."""

    def one(key):
        writing, reading = jax.random.split(key)
        stored = storage.write(params, allotted, writing, cell=CELL)
        return flj.loss(MODEL, storage.read(stored, reading), held)

    return jax.vmap(one)(jax.random.split(jax.random.key(99), 100))


def test_cells_allotted_by_it_raise_the_loss_of_certain_networks_less():
    estimator, key = flj.inverse.diagonal(MODEL), jax.random.key(0)
    better, than_equal = [], []
    for seed in range(4):
        params, inputs, labels = problem(seed, scale=3.0, examples=768, width=24)
        batches = [(inputs[i : i + 128], labels[i : i + 128]) for i in range(0, 512, 128)]
        held = inputs[512:], labels[512:]
        cells = 4 * sum(w.size for w in jax.tree.leaves(params))
        state = flj.fit(estimator, params, batches, key=key)
        at_weights = estimator.fisher_diagonal(state, params)
        noisy = storage.fisher_under_noise(estimator, params, batches * 4, 4, key=key, cell=CELL)
        ours, theirs, same = (
            np.asarray(losses(params, allotted, held))
            for allotted in (
                storage.allot(noisy, params, cells=cells, cell=CELL),
                storage.allot(at_weights, params, cells=cells, cell=CELL),
                storage.equal(params, cells),
            )
        )
        better.append(theirs - ours)  # the draws have common random numbers
        than_equal.append(same - ours)
    for gains in np.array([better, than_equal]):
        assert gains.mean() > 3 * gains.std() / gains.size**0.5


def test_bad_input():
    params, *batch = problem(0)
    batches, key = [tuple(batch)], jax.random.key(0)
    with pytest.raises(ValueError, match="fisher_diagonal"):
        storage.fisher_under_noise(flj.inverse.identity(), params, batches, 1, key=key)
    with pytest.raises(ValueError, match="batches"):
        storage.fisher_under_noise(EMPIRICAL, params, [], 1, key=key)
    with pytest.raises(ValueError, match="cells"):
        storage.fisher_under_noise(EMPIRICAL, params, batches, 0, key=key)
    with pytest.raises(ValueError, match="key"):
        storage.fisher_under_noise(EMPIRICAL, params, batches, 1, key=None)
