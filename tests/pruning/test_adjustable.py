"""Leaves that a compensation may not move stay as they are, and it does not count on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import dense

MODEL = flj.Model(lambda p, x: jnp.tanh(x @ p["body"]) @ p["head"], flj.likelihoods.gaussian())
DAMPING = 0.05
EXAMPLES = 40
HEAD = np.repeat([False, True], [20, 12])
COMPENSATIONS = {
    "independent": flj.compensation.independent(),
    "first_order": flj.compensation.independent(first_order=True, check_step=False),
    "group": flj.compensation.group(
        damping=DAMPING, iterations=200, tolerance=1e-13, check_step=False
    ),
}


def problem(key):
    params = dense.random_like(key, {"body": jnp.ones((5, 4)), "head": jnp.ones((4, 3))})
    x = jax.random.normal(jax.random.key(1), (EXAMPLES, 5), params["body"].dtype)
    y = jax.random.normal(jax.random.key(2), (EXAMPLES, 3), params["body"].dtype)
    return params, (x, y)


# one of each for all tests, that it compiles once
ESTIMATES = {
    "woodfisher": flj.inverse.woodfisher(MODEL, DAMPING, gradients=EXAMPLES),
    "mfac": flj.inverse.mfac(MODEL, DAMPING, window=EXAMPLES),
    "kfac": flj.inverse.kfac(MODEL),
    "diagonal": flj.inverse.diagonal(MODEL, DAMPING),
}


@pytest.mark.parametrize("name, first_order", [("woodfisher", False), ("mfac", True)])
def test_independent_is_the_surgeon_of_the_adjustable_leaves_alone(x64, key, name, first_order):
    """By dense algebra: the inverse of their own block of the Fisher."""
    params, batch = problem(key)
    rows = dense.gradients(MODEL, params, batch)[:, HEAD]
    inverse = np.linalg.inv(rows.T @ rows / EXAMPLES + DAMPING * np.eye(12))
    weights, gradient = dense.ravel(params)[HEAD], rows.mean(axis=0) * first_order
    target = weights - inverse @ gradient
    gone = np.zeros(12, bool)
    gone[np.argsort(target**2 / np.diag(inverse))[:6]] = True
    delta = -inverse @ (gradient + np.where(gone, target / np.diag(inverse), 0))
    expected = np.where(gone, 0, weights + delta)

    result = flj.prune_one_shot(
        MODEL,
        params,
        ESTIMATES[name],
        [batch],
        sparsity=0.5,
        compensation=COMPENSATIONS["first_order" if first_order else "independent"],
        prunable=flj.Leaves("head", adjustable="head"),
    )
    np.testing.assert_array_equal(result.params["body"], params["body"])
    np.testing.assert_allclose(dense.ravel(result.params["head"]), expected, atol=1e-9)


@pytest.mark.parametrize("prunable", ["head", "body", "head|body"])
def test_group_is_the_minimiser_over_the_adjustable_leaves(x64, key, prunable):
    """By dense algebra: `F_KK⁻¹ F_KS w_S` with K the kept weights of the head."""
    params, batch = problem(key)
    result = flj.prune_one_shot(
        MODEL,
        params,
        ESTIMATES["woodfisher"],
        [batch],
        sparsity=0.5,
        compensation=COMPENSATIONS["group"],
        prunable=flj.Leaves(prunable, adjustable={"head": True}),
    )
    matrix = dense.exact_fisher(MODEL, params, batch, lambda o: np.eye(3))
    kept = dense.ravel(result.masks)
    weights, free = dense.ravel(params), kept & HEAD
    block = matrix[np.ix_(free, free)] + DAMPING * np.eye(free.sum())
    expected = np.where(kept, weights, 0)
    expected[free] += np.linalg.solve(block, matrix[np.ix_(free, ~kept)] @ weights[~kept])
    np.testing.assert_allclose(dense.ravel(result.params), expected, atol=1e-8)


@pytest.mark.parametrize("name", [*COMPENSATIONS, "none"])
def test_frozen_leaves_do_not_move_in_stages_or_in_a_chain(key, name):
    """A backbone that `optax.masked` keeps from training is kept from compensation, too."""
    params, batch = problem(key)
    compensation = COMPENSATIONS.get(name, flj.compensation.none())
    estimator = ESTIMATES["diagonal"]
    options = {"prunable": flj.Leaves("head", adjustable=["head"]), "compensation": compensation}
    result = flj.prune_one_shot(
        MODEL, params, ESTIMATES["kfac"], [batch], sparsity=0.5, stages=2, **options
    )
    np.testing.assert_array_equal(result.params["body"], params["body"])
    frozen = optax.masked(optax.set_to_zero(), {"body": True, "head": False})
    pruning = flj.gradual_prune(estimator, 0.5, model=MODEL, aux_every=2, mask_every=2, **options)
    tx = optax.chain(optax.sgd(0.01), frozen, pruning)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    moved, state = params, tx.init(params)
    for _ in range(4):
        moved, state = step(moved, state)
    np.testing.assert_array_equal(moved["body"], params["body"])
    assert flj.sparsity(moved["head"]) == 0.5 and flj.check(state).ok


def test_an_estimate_learned_in_a_chain_is_of_the_adjustable_leaves(key):
    """FishLeg's, the default of a chain: nothing is learned of leaves that stay."""
    params, batch = problem(key)
    tx = flj.fishleg_prune(
        MODEL, 0.5, prunable=flj.Leaves("head", adjustable=lambda name, w: name == "head")
    )
    state = tx.init(params)
    assert sorted(state.adjustable) == ["head"]
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params, batch=batch)
    assert float(abs(state.estimate.moments["body"][0]).max()) == 0
    assert float(abs(state.estimate.moments["head"][0]).max()) > 0


def test_a_compensation_that_can_not_be_told_is_refused(key):
    params, batch = problem(key)
    mine = lambda p, old, new, curvature, estimator, state: (p, {})
    with pytest.raises(ValueError, match="adjustable needs a compensation with a keyword"):
        flj.prune_one_shot(
            MODEL,
            params,
            flj.inverse.identity(),
            [batch],
            sparsity=0.5,
            compensation=mine,
            prunable=flj.Leaves(adjustable="head"),
        )
    with pytest.raises(ValueError, match="adjustable needs a compensation with a keyword"):
        flj.gradual_prune(
            flj.inverse.identity(), 0.5, compensation=mine, prunable=flj.Leaves(adjustable="head")
        )
    with pytest.raises(ValueError, match="adjustable: 'tail' matches no leaf"):
        flj.gradual_prune(flj.inverse.identity(), 0.5, prunable=flj.Leaves(adjustable="tail")).init(
            params
        )
