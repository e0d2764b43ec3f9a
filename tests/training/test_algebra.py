"""Directions against dense algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from tests.dense import matrix_of, ravel

GAMMA = 0.03


def predict(params, x):
    return x @ params


MODEL = flj.Model(predict, flj.likelihoods.gaussian())


@pytest.fixture
def problem(x64):
    """One output, so that a few Fisher samples along the inputs are the whole Fisher."""
    inputs = jax.random.normal(jax.random.key(0), (24, 5)) @ jax.random.normal(
        jax.random.key(1), (5, 5)
    )
    targets = inputs @ jnp.arange(5.0) + jax.random.normal(jax.random.key(2), (24,))
    return jnp.ones(5), (inputs, targets)


def gradient(params, batch):
    return jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)


def direction(tx, params, batch, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch)
    return updates


# the Fisher of a linear Gaussian model does not depend on labels: single examples give it exactly
EXACT = {"factors": factors.full, "examples_per_sample": 1}


def test_a_full_factor_gives_the_damped_natural_gradient(problem):
    params, batch = problem
    tx = flj.scale_by_inverse_fisher(flj.inverse.fishleg(MODEL, GAMMA, **EXACT))
    fisher = matrix_of(lambda v: flj.fisher_vector_product(MODEL, params, batch, v), params)
    expected = np.linalg.solve(fisher + GAMMA * np.eye(5), ravel(gradient(params, batch)))
    np.testing.assert_allclose(direction(tx, params, batch), expected, rtol=1e-10)


def test_a_step_of_one_lands_at_the_minimum_of_a_quadratic(problem):
    params, (inputs, targets) = problem
    tx = optax.chain(
        flj.scale_by_inverse_fisher(flj.inverse.fishleg(MODEL, 1e-9, **EXACT)),
        optax.scale_by_learning_rate(1.0),
    )
    found = optax.apply_updates(params, direction(tx, params, (inputs, targets)))
    minimum = np.linalg.lstsq(np.asarray(inputs), np.asarray(targets), rcond=None)[0]
    assert np.abs(minimum - params).max() > 0.5
    np.testing.assert_allclose(found, minimum, rtol=1e-6)


def test_steps_do_not_depend_on_the_coordinates_of_the_inputs(problem):
    """With weights in other coordinates, as γ → 0, the function after the step is the same."""
    params, (inputs, targets) = problem
    change = jax.random.normal(jax.random.key(5), (5, 5)) + 2 * jnp.eye(5)
    tx = flj.scale_by_inverse_fisher(flj.inverse.fishleg(MODEL, 1e-9, **EXACT))
    one = direction(tx, params, (inputs, targets))
    other = direction(tx, jnp.linalg.solve(change, params), (inputs @ change, targets))
    np.testing.assert_allclose(inputs @ change @ other, inputs @ one, rtol=1e-5)
    # not so for the gradient itself
    plain = flj.scale_by_inverse_fisher(flj.inverse.identity())
    one = direction(plain, params, (inputs, targets))
    other = direction(plain, jnp.linalg.solve(change, params), (inputs @ change, targets))
    assert not np.allclose(inputs @ change @ other, inputs @ one, rtol=0.1)


@pytest.mark.parametrize(
    "damping", [0.5, lambda step: 1.0 / (1 + step)], ids=["number", "schedule"]
)
def test_a_given_damping_replaces_the_estimates_own(problem, damping):
    params, batch = problem
    estimator = flj.inverse.fishleg(MODEL, GAMMA, **EXACT)
    tx = flj.scale_by_inverse_fisher(estimator, damping=damping)
    own = flj.scale_by_inverse_fisher(flj.inverse.fishleg(MODEL, 0.5, **EXACT))
    np.testing.assert_allclose(
        direction(tx, params, batch), direction(own, params, batch), rtol=1e-12
    )


def test_the_running_mean_of_equal_gradients_is_the_gradient(problem):
    params, batch = problem
    tx = flj.scale_by_inverse_fisher(flj.inverse.identity(), momentum=0.9)
    for steps in (1, 4):
        expected = gradient(params, batch)
        np.testing.assert_allclose(direction(tx, params, batch, steps), expected, rtol=1e-12)


def test_a_bound_on_the_fisher_norm_shortens_longer_directions_only(problem):
    params, batch = problem
    estimator = flj.inverse.fishleg(MODEL, GAMMA, **EXACT)
    free = direction(flj.scale_by_inverse_fisher(estimator), params, batch)
    norm = np.sqrt(float(free @ gradient(params, batch)))
    for factor, expected in ((2.0, free), (0.5, 0.5 * free)):
        tx = flj.scale_by_inverse_fisher(estimator, max_fisher_norm=factor * norm)
        np.testing.assert_allclose(direction(tx, params, batch), expected, rtol=1e-12)
        state = tx.update(gradient(params, batch), tx.init(params), params, batch=batch)[1]
        np.testing.assert_allclose(state.fisher_norm, min(factor, 1) * norm, rtol=1e-12)


@pytest.mark.parametrize(
    "name, steps", [("sgd", optax.identity()), ("adam", optax.scale_by_adam())]
)
def test_grafting_takes_the_direction_of_one_and_the_lengths_of_another(name, steps, problem):
    params, batch = problem
    estimator = flj.inverse.fishleg(MODEL, GAMMA, **EXACT)
    free = direction(flj.scale_by_inverse_fisher(estimator), params, batch)
    found = direction(flj.scale_by_inverse_fisher(estimator, grafting=name), params, batch)
    lengths, _ = steps.update(gradient(params, batch), steps.init(params))
    expected = free * np.linalg.norm(lengths) / np.linalg.norm(free)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
