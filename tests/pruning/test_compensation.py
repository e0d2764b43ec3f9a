"""Compensations against the formulas of Optimal Brain Surgeon, dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from tests import dense


def any_inverse(params, seed=0):
    """An estimator whose inverse Fisher is one dense positive definite matrix, and the matrix."""
    flat, _ = ravel_pytree(params)
    root = np.random.default_rng(seed).normal(size=(flat.size, flat.size + 3))
    q = jnp.asarray(root @ root.T, flat.dtype)
    return q, dense.estimator_of(q)


def weights_and_masks(key, dtype=jnp.float64):
    params = dense.mlp_params(key, (3, 4, 2), dtype)
    everything = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    old, new = everything, everything
    for i in range(2):
        kernel = params[f"Dense_{i}"]["kernel"]
        first, second = jax.random.bernoulli(jax.random.key(i), 0.7, (2, *kernel.shape))
        old = old | {f"Dense_{i}": {"kernel": first, "bias": old[f"Dense_{i}"]["bias"]}}
        new = new | {f"Dense_{i}": {"kernel": first & second, "bias": old[f"Dense_{i}"]["bias"]}}
    return params, everything, old, new


@pytest.mark.parametrize("again", [False, True], ids=["first pruning", "second pruning"])
def test_independent_is_the_sum_of_single_corrections(x64, key, again):
    """`−Σ_{i in S} (w_i / q_ii) Q e_i`, and S at zero; what was pruned before takes no part."""
    params, everything, old, new = weights_and_masks(key)
    old = old if again else everything
    params = flj.apply_masks(params, old)
    q, estimator = any_inverse(params)
    delta, _ = flj.compensation.independent()(params, old, new, None, estimator, ())
    w, before, after = map(dense.ravel, (params, old, new))
    q = np.asarray(q)
    before, after = before.astype(bool), after.astype(bool)
    expected = np.zeros_like(w)
    for i in np.flatnonzero(before & ~after):
        expected -= w[i] / q[i, i] * q[:, i] * before
    expected[~after] = -w[~after]
    np.testing.assert_allclose(dense.ravel(delta), expected, atol=1e-10)


def test_one_weight_alone_is_the_exact_minimiser(x64, key):
    """OBS: of all changes that zero one weight, δ raises ½ δᵀFδ least, and by its saliency."""
    params, everything, _, _ = weights_and_masks(key)
    q, estimator = any_inverse(params)
    new = jax.tree.map(jnp.copy, everything)
    new["Dense_0"]["kernel"] = new["Dense_0"]["kernel"].at[1, 2].set(False)
    delta, _ = flj.compensation.independent()(params, everything, new, None, estimator, ())
    delta, kept = dense.ravel(delta), dense.ravel(new).astype(bool)
    fisher = np.linalg.inv(q)
    np.testing.assert_allclose((fisher @ delta)[kept], 0, atol=1e-8)
    saliency = flj.obs_saliency(params, estimator.diagonal((), params))
    score = float(saliency["Dense_0"]["kernel"][1, 2])
    assert 0.5 * delta @ fisher @ delta == pytest.approx(score, rel=1e-8)


@pytest.mark.parametrize("make", [flj.compensation.independent, flj.compensation.none])
def test_identity_changes_no_kept_weight(key, make):
    params, _, old, new = weights_and_masks(key, jnp.float32)
    params = flj.apply_masks(params, old)
    delta, _ = make()(params, old, new, None, flj.inverse.identity(), ())
    expected = jax.tree.map(lambda w, m: jnp.where(m, 0, -w), params, new)
    jax.tree.map(np.testing.assert_array_equal, delta, expected)


def test_none_ignores_the_estimator(x64, key):
    params, _, old, new = weights_and_masks(key)
    delta, _ = flj.compensation.none()(params, old, new, None, any_inverse(params)[1], ())
    moved = jax.tree.map(jnp.add, params, delta)
    jax.tree.map(np.testing.assert_array_equal, moved, flj.apply_masks(params, new))


@pytest.mark.parametrize("make", [flj.compensation.independent, flj.compensation.none])
def test_bfloat16_weights_are_compensated_in_float32(key, make):
    params, _, old, new = weights_and_masks(key, jnp.bfloat16)
    delta, _ = make()(params, old, new, None, flj.inverse.identity(), ())
    assert {d.dtype for d in jax.tree.leaves(delta)} == {jnp.dtype(jnp.float32)}
