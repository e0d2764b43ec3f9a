"""FishLeg weighs batches by their examples: however these are cut, the Fisher is that of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._fishleg.start import RELATIVE_DAMPING
from tests import dense

MODEL = flj.Model(lambda w, x: x @ w, flj.likelihoods.categorical())
fishleg = functools.cache(functools.partial(flj.inverse.fishleg, MODEL, examples_per_sample=1))


def problem(seed, sizes, dtype=jnp.float64):
    """Softmax regression in batches of those sizes, and the Fisher of all examples.

    The examples of the last batch are some times as large, so that their weight shows.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    examples = sum(sizes)
    inputs = jax.random.normal(keys[0], (examples, 4), dtype)
    inputs = inputs.at[-sizes[-1] :].multiply(4.0)
    params = 0.3 * jax.random.normal(keys[1], (4, 3), dtype)
    ends = np.cumsum(sizes)
    batches = [(inputs[e - n : e], None) for e, n in zip(ends, sizes, strict=True)]
    return params, batches, dense.exact_fisher(MODEL, params, (inputs, None))


@functools.cache
def update_of(estimator):
    return jax.jit(estimator.update)


@functools.cache
def rounds_of(update):
    """Batch after batch, round after round, in one program."""

    def loop(state, params, batches, rounds, key):
        def once(i, state):
            for k, batch in enumerate(batches):
                number = i * len(batches) + k
                state = update(state, params, batch, jax.random.fold_in(key, number))
            return state

        return jax.lax.fori_loop(0, rounds, once, state)

    return jax.jit(loop)


def run(estimator, params, batches, updates, seed):
    """So many updates, batch after batch."""
    rounds, rest = divmod(updates, len(batches))
    assert rest == 0
    loop = rounds_of(update_of(estimator))
    return loop(estimator.init(params), params, batches, rounds, jax.random.key(seed))


@pytest.mark.parametrize("sizes", [(64, 64, 1), (96, 2), (1,) * 5], ids=str)
def test_automatic_damping_is_that_of_all_examples(x64, sizes):
    """Of the pooled Fisher's diagonal; also where no batch has two examples."""
    updates = 900
    estimator = fishleg()
    errors = []
    for seed in range(3):
        params, batches, fisher = problem(seed, sizes)
        state = run(estimator, params, batches, updates, seed)
        expected = RELATIVE_DAMPING * np.mean(np.diag(fisher))
        errors.append(float(state.damping) / expected - 1)
    assert np.abs(errors).max() < 0.1, errors
    assert abs(np.mean(errors)) < 0.05, errors


@pytest.mark.parametrize("sizes, factor", [((64, 64, 1), "full"), ((96, 2), "diagonal")], ids=str)
def test_the_start_is_that_of_all_examples(x64, sizes, factor):
    """The diagonal of the inverse against dense algebra, from moments and from a spectrum."""
    estimator = fishleg(0.05, factors=getattr(factors, factor))
    for seed in range(2):
        params, batches, fisher = problem(seed, sizes)
        state = run(estimator, params, batches, 600, seed)
        if factor == "diagonal":
            fisher = np.diag(np.diag(fisher))
        expected = np.diag(np.linalg.inv(fisher + 0.05 * np.eye(12)))
        found = dense.inverse_diagonal(estimator, state, params)
        assert np.mean(np.abs(found / expected - 1)) < 0.06


def test_learning_comes_to_rest_at_the_inverse_of_all_examples(x64):
    updates = 1500
    params, batches, fisher = problem(0, (48, 2))
    estimator = fishleg(
        0.05,
        factors=factors.full,
        learn=True,
        start=16,
        updates=updates,
        window=200,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, updates)),
    )
    state = run(estimator, params, batches, updates, 0)
    expected = np.linalg.inv(fisher + 0.05 * np.eye(12))
    found = dense.inverse_matrix(estimator, state, params)
    assert np.linalg.norm(found - expected) < 0.06 * np.linalg.norm(expected)
    diagonal = np.diag(found) / np.diag(expected)
    assert np.abs(diagonal - 1).max() < 0.1
    # smoothed over batches of both sizes it is the loss of all, −½ tr of the inverse
    assert float(state.auxiliary_loss) == pytest.approx(-0.5 * np.trace(expected), rel=0.2)


def test_a_batch_of_few_examples_moves_means_by_its_examples(x64):
    """One example after three batches of 64 has a share of one in 193, in each phase."""
    params, batches, _ = problem(0, (64, 1))
    estimator = fishleg(factors=factors.diagonal)
    for before in (3, 7):
        state = run(estimator, params, batches[:1], before, 0)
        after = update_of(estimator)(state, params, batches[1], jax.random.key(9))
        assert after.count == state.count + 1
        assert after.seen == 64 * before + 1
        old, new = state.frames[""].spectrum, after.frames[""].spectrum
        lone = old + (64 * before + 1) * (new - old)  # of the last sample alone, so not negative
        assert (lone > -1e-9).all() and np.abs(new - old).max() > 0
    # in learning the running average goes by a share, too: by all of it with a batch like others
    estimator = fishleg(learn=True, start=8, factors=factors.diagonal, window=1)
    state = run(estimator, params, batches[:1], 12, 0)
    moved = {}
    for k, batch in enumerate(batches):
        after = update_of(estimator)(state, params, batch, jax.random.key(9))
        moved[k] = float(
            jnp.abs(after.average[""].log_spectrum - state.average[""].log_spectrum).max()
        )
    assert moved[1] == pytest.approx(moved[0] * 13 / (64 * 12 + 1), rel=1e-6)


def test_which_weight_is_pruned_does_not_hang_on_the_batches(x64):
    """64 examples that hold one weight and a last one that holds the other."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = jnp.zeros((65, 2)).at[:64, 0].set(1.0).at[64, 1].set(4.0)
    params = jnp.array([[1.0], [1.2]])  # F = diag(64, 16) / 65
    estimator = flj.inverse.fishleg(model, 0.02)
    batches = [(inputs[:64], None), (inputs[64:], None)]
    for cut in (batches, [(inputs, None)]):
        result = flj.prune_one_shot(
            model, params, estimator, cut, sparsity=0.5, prunable=".*", key=jax.random.key(1)
        )
        assert result.masks[:, 0].tolist() == [True, False]
