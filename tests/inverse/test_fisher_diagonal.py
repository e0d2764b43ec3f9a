"""The diagonal of the undamped Fisher that every estimate knows, against dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from tests import dense

MODEL = dense.categorical_mlp()


def problem(seed, examples=12):
    key = jax.random.key(seed)
    params = dense.mlp_params(key, (3, 4, 3))
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    masks["Dense_0"]["kernel"] = masks["Dense_0"]["kernel"].at[0].set(False)
    return params, masks, dense.classification_batch(jax.random.fold_in(key, 1), examples)


def found(estimator, state, params, masks=None):
    return dense.ravel(dense.jitted(estimator.fisher_diagonal)(state, params, masks))


ROWS = {
    "diagonal": flj.inverse.diagonal(MODEL, labels="empirical"),
    "woodfisher": flj.inverse.woodfisher(MODEL, gradients=12),  # a window: fewer than weights
    "woodfisher, square root": flj.inverse.woodfisher(MODEL, gradients=12, block_size=5),
    "woodfisher, leaves": flj.inverse.woodfisher(MODEL, gradients=12, block_size="leaf"),
    "mfac": flj.inverse.mfac(MODEL, window=20),
    "mfac, blocks": flj.inverse.mfac(MODEL, window=12, block_size=5),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_it_is_that_of_the_gradients(x64, name, masked):
    """`diag(mean g gᵀ)`, of what the mask leaves."""
    for seed in range(3):
        params, masks, batch = problem(seed)
        masks = masks if masked else None
        state = flj.fit(ROWS[name], params, [batch], key=jax.random.key(0), masks=masks)
        rows = dense.gradients(MODEL, params, batch)
        if masked:
            rows = rows * dense.ravel(masks)
        expected = np.diag(dense.gram(rows))
        np.testing.assert_allclose(found(ROWS[name], state, params, masks), expected, rtol=1e-10)


def test_a_window_forgets_the_oldest_gradients(x64):
    estimator = flj.inverse.mfac(MODEL, window=8)
    params, _, (inputs, labels) = problem(0)
    parts = [(inputs[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    state = flj.fit(estimator, params, parts, key=jax.random.key(0))
    rows = dense.gradients(MODEL, params, (inputs[4:], labels[4:]))
    np.testing.assert_allclose(
        found(estimator, state, params), np.mean(rows**2, axis=0), rtol=1e-10
    )


def test_gradients_beyond_those_waited_for_count_for_nothing(x64):
    """Where blocks are kept as a square root, as where the gradients are."""
    params, _, (inputs, labels) = problem(0)
    rows = dense.gradients(MODEL, params, (inputs[:10], labels[:10]))
    for size in (5, None):
        estimator = flj.inverse.woodfisher(MODEL, gradients=10, block_size=size)
        state = flj.fit(estimator, params, [(inputs, labels)], key=jax.random.key(0))
        np.testing.assert_allclose(
            found(estimator, state, params), np.mean(rows**2, axis=0), rtol=1e-10
        )


@pytest.mark.parametrize("cap", [None, 2])
def test_that_of_kfac_is_of_the_product_of_its_factors(x64, cap):
    """Factors in blocks of 2 do not divide an axis of 3."""
    estimator = flj.inverse.kfac(MODEL, labels="empirical", cap=cap)
    params, _, batch = problem(0)
    state = flj.fit(estimator, params, [batch], key=jax.random.key(0))
    expected = []
    for leaf in jax.tree.leaves(flj.per_example_gradients(MODEL, params, batch)):
        leaf = np.asarray(leaf)
        if leaf.ndim == 2:
            expected.append(np.mean(leaf**2, axis=0))
            continue
        total = np.mean(np.sum(leaf**2, axis=(1, 2)))
        one = np.einsum("kij,klj->il", leaf, leaf) / len(leaf)
        two = np.einsum("kij,kil->jl", leaf, leaf) / len(leaf)
        expected.append(np.diag(np.kron(one, two)) / total)
    expected = np.concatenate([x.reshape(-1) for x in expected])
    np.testing.assert_allclose(found(estimator, state, params), expected, rtol=1e-10)


CONSTRUCTORS = {
    "by shape": None,
    "kronecker": {"kernel": factors.kronecker},
    "sandwich": {"kernel": factors.spectral},
    "blocks": factors.block_diagonal,
    "full": factors.full,
    "diagonal": factors.diagonal,
}


@functools.cache
def fishleg(name, join_bias=False, **options):
    return flj.inverse.fishleg(
        MODEL,
        1e-2,
        factors=CONSTRUCTORS[name],
        join_bias=join_bias,
        examples_per_sample=3,
        **options,
    )


@pytest.mark.parametrize(
    "name, join_bias", [("by shape", True), *((name, False) for name in CONSTRUCTORS)]
)
def test_that_of_fishleg_is_of_the_matrix_it_starts_from(x64, name, join_bias):
    """Before anything is learned Q is the inverse of `F + γI`, at a vanishing γ that of F."""
    estimator = fishleg(name, join_bias, cap=None if join_bias else 3)
    params, _, batch = problem(0)
    state = dense.run(estimator, params, batch, 8, jax.random.key(0))
    vanishing = 1e-10
    inverse = dense.inverse_matrix(
        estimator, state._replace(damping=jnp.asarray(vanishing)), params
    )
    # zeros in the spectrum are the damping, and stay it in the inverse of the inverse
    expected = np.diag(np.linalg.inv(inverse))
    np.testing.assert_allclose(
        found(estimator, state, params), expected, rtol=1e-4, atol=3e-5 * expected.max()
    )


def test_that_of_a_full_factor_is_near_the_true_one(x64):
    """Every error is one that the mean of 1,600 samples of three examples makes."""
    estimator = flj.inverse.fishleg(MODEL, 1e-2, factors=factors.full, examples_per_sample=3)
    for seed in range(3):
        params, _, batch = problem(seed)
        state = dense.run(estimator, params, batch, 400, jax.random.key(seed))
        expected = np.diag(dense.exact_fisher(MODEL, params, batch))
        outputs, jacobians = map(np.asarray, dense.jacobian(MODEL, params, batch))
        p = dense.softmax(outputs)
        scores = np.einsum("kcd,klc->kld", jacobians, p[:, None] - np.eye(3))
        fourth = np.einsum("kl,kld->d", p, scores**4) / len(p)
        # E[M⁴] of M = Σ g / √3, of which 3 F² alone would be left for very many examples
        scatter = np.sqrt((2 / 3 * 3 * expected**2 + fourth / 3 - expected**2) / 1600)
        assert np.abs((found(estimator, state, params) - expected) / scatter).max() < 5


def test_the_identity_knows_of_none():
    assert flj.inverse.identity().fisher_diagonal is None
