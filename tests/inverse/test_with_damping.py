"""States at another damping."""

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from tests import dense

MODEL = dense.categorical_mlp()
MAKERS = {
    "diagonal": flj.inverse.diagonal,
    "kfac": flj.inverse.kfac,
    "mfac": lambda model, damping: flj.inverse.mfac(model, damping, window=12),
    "woodfisher": lambda model, damping: flj.inverse.woodfisher(model, damping, gradients=12),
}


def fitted(name, damping):
    key = jax.random.key(0)
    params, batch = dense.mlp_params(key), dense.classification_batch(key)
    estimator = MAKERS[name](MODEL, damping)
    return estimator, params, flj.fit(estimator, params, [batch], key=key)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_at_another_damping_is_that_of_a_fit_there(x64, name):
    estimator, params, state = fitted(name, 0.3)
    _, _, expected = fitted(name, 0.1)
    wanted = dense.inverse_matrix(estimator, expected, params)
    moved = flj.inverse.with_damping(state, 0.1)
    assert moved.damping.dtype == state.damping.dtype
    found = [dense.inverse_matrix(estimator, moved, params)]
    if estimator.prepare is not None:  # made for a damping, which must not stay in it
        ready = flj.inverse.with_damping(dense.jitted(estimator.prepare)(state, params), 0.1)
        found.append(dense.inverse_matrix(estimator, ready, params))
    for matrix in found:
        np.testing.assert_allclose(matrix, wanted, atol=1e-9 * abs(wanted).max())
    assert abs(dense.inverse_matrix(estimator, state, params) - wanted).max() > 0.1


def test_a_damping_that_is_part_of_the_fit_is_refused():
    """In place of a state that says one damping and has the inverse of another."""
    key = jax.random.key(0)
    params, batch = dense.mlp_params(key), dense.classification_batch(key)
    estimator = flj.inverse.woodfisher(MODEL, 0.1, gradients=12, block_size=4)
    state = flj.fit(estimator, params, [batch], key=key)
    with pytest.raises(ValueError, match="state contains square roots for the damping"):
        flj.inverse.with_damping(state, 0.3)


@pytest.mark.parametrize("damping", [-1.0, 0.0, float("nan"), True, "0.01", None])
def test_an_invalid_damping_is_refused(damping):
    state = flj.inverse.diagonal(MODEL, 0.1).init(dense.mlp_params(jax.random.key(0)))
    with pytest.raises(ValueError, match="damping must be a positive"):
        flj.inverse.with_damping(state, damping)


def test_a_state_without_a_damping_is_refused():
    with pytest.raises(ValueError, match="state must have a damping, got tuple"):
        flj.inverse.with_damping((), 1.0)
