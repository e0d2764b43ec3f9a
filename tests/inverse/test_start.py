"""The damping that the start measures where the user names none."""

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from fishleg_jax.inverse._start import RELATIVE_DAMPING


def predict(params, x):
    """A linear layer whose bias has ten thousand times the Fisher of its kernel."""
    return x @ params["kernel"] + 100 * params["bias"]


def test_vectors_do_not_count_beside_matrices():
    model = flj.Model(predict, flj.likelihoods.gaussian())
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    inputs = jax.random.rademacher(jax.random.key(0), (64, 3), jnp.float32)
    estimator = flj.inverse.fishleg(model, learn=False)
    state = flj.fit(estimator, params, [(inputs, None)], key=jax.random.key(1))
    # the kernel's Fisher has ones on its diagonal; 384 fourth moments scatter by a sixth
    assert abs(state.damping / RELATIVE_DAMPING - 1) < 0.4


def test_vectors_count_where_there_is_nothing_else():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = 2 * jax.random.rademacher(jax.random.key(0), (64, 6), jnp.float32)
    estimator = flj.inverse.fishleg(model, learn=False)
    state = flj.fit(estimator, jnp.zeros(6), [(inputs, None)], key=jax.random.key(1))
    assert abs(state.damping / (4 * RELATIVE_DAMPING) - 1) < 0.4
