"""The start in closed form: what it takes from which batches, and the damping that it measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._fishleg.start import RELATIVE_DAMPING


def predict(params, x):
    """A linear layer whose bias has ten thousand times the Fisher of its kernel."""
    return x @ params["kernel"] + 100 * params["bias"]


def test_vectors_do_not_count_beside_matrices():
    model = flj.Model(predict, flj.likelihoods.gaussian())
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    inputs = jax.random.rademacher(jax.random.key(0), (64, 3), jnp.float32)
    estimator = flj.inverse.fishleg(model, learn=False)
    state = flj.fit(estimator, params, [(inputs, None)], key=jax.random.key(1))
    # the kernel's Fisher has ones on its diagonal
    assert abs(state.damping / RELATIVE_DAMPING - 1) < 0.1


def test_vectors_count_where_there_is_nothing_else():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = 2 * jax.random.rademacher(jax.random.key(0), (64, 6), jnp.float32)
    estimator = flj.inverse.fishleg(model, learn=False)
    state = flj.fit(estimator, jnp.zeros(6), [(inputs, None)], key=jax.random.key(1))
    assert abs(state.damping / (4 * RELATIVE_DAMPING) - 1) < 0.1


@pytest.mark.parametrize("factor", [factors.kronecker, factors.spectral])
def test_moments_are_of_all_batches_but_where_a_spectrum_is_learned_too(factor):
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    first, second = (jnp.zeros((64, 2)).at[:, i].set(1) for i in (0, 1))  # one input each
    estimator = flj.inverse.fishleg(model, 0.1, factors=factor, learn=False, start=4)
    batches = [(x, None) for x in (first, first, second, second)]
    state = flj.fit(estimator, jnp.ones((2, 3)), batches, key=jax.random.key(0))
    ((moments,), _) = next(iter(state.moments.values()))
    assert moments[0, 0] > 0
    assert (moments[1, 1] > 0) == (factor is factors.kronecker)


@pytest.mark.parametrize("least, samples", [(4, 4), (8, 2), (9, 1)])
def test_a_batch_gives_as_many_samples_as_have_enough_examples(least, samples):
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = jax.random.normal(jax.random.key(0), (16, 12))
    estimator = flj.inverse.fishleg(
        model, 0.1, factors=factors.full, learn=False, start=2, examples_per_sample=least
    )
    state = flj.fit(estimator, jnp.ones(12), [(inputs, None)], key=jax.random.key(1))
    ((moments,),) = state.moments.values()
    assert np.linalg.matrix_rank(moments[0]) == 2 * samples  # of two batches
