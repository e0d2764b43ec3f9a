"""K-FAC and the diagonal against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests import dense

MODEL = dense.categorical_mlp()
DAMPING = 0.02


def problem(key, examples=24):
    params = dense.mlp_params(key, (3, 5, 3))
    return params, dense.classification_batch(key, examples)


def cut(batch, size):
    return [tuple(x[i : i + size] for x in batch) for i in range(0, len(batch[0]), size)]


def exact_kfac(matrices, damping):
    """`(a + π√γ)⁻¹ ⊗ (b + √γ/π)⁻¹` of gradients (examples, in, out), by a solver."""
    t = np.mean(np.sum(matrices**2, axis=(1, 2)))
    a = np.einsum("nio,njo->ij", matrices, matrices) / len(matrices) / np.sqrt(t)
    b = np.einsum("nio,nip->op", matrices, matrices) / len(matrices) / np.sqrt(t)
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
    a = a + pi * np.sqrt(damping) * np.eye(len(a))
    b = b + np.sqrt(damping) / pi * np.eye(len(b))
    return np.kron(np.linalg.inv(a), np.linalg.inv(b))


def test_kfac_is_the_kronecker_product_of_its_factors(x64, key):
    """Kernels by the formula, biases diagonal; and the batches' sizes don't matter."""
    params, batch = problem(key)
    estimator = flj.inverse.kfac(MODEL, DAMPING, labels="empirical")
    state = flj.fit(estimator, params, cut(batch, 8), key=key)
    found = dense.inverse_matrix(estimator, state, params)
    gradients, begin = dense.gradients(MODEL, params, batch), 0
    expected = np.zeros_like(found)
    for leaf in jax.tree.leaves(params):
        rows = gradients[:, begin : begin + leaf.size]
        block = np.diag(1 / (np.mean(rows**2, axis=0) + DAMPING))
        if leaf.ndim == 2:
            block = exact_kfac(rows.reshape(-1, *leaf.shape), DAMPING)
        expected[begin : begin + leaf.size, begin : begin + leaf.size] = block
        begin += leaf.size
    np.testing.assert_allclose(found, expected, atol=1e-9 * expected.max())
    diagonal = dense.inverse_diagonal(estimator, state, params)
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=1e-9)


def test_kfac_is_exact_where_the_fisher_is_a_kronecker_product(x64, key):
    """A linear model with Gaussian outputs: E[x xᵀ] ⊗ I, up to the noise of sampled labels."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    params = jax.random.normal(key, (4, 3))
    inputs = jax.random.normal(key, (40, 4)) @ jax.random.normal(jax.random.key(1), (4, 4))
    estimator = flj.inverse.kfac(model, 1e-9)
    state = flj.fit(estimator, params, [(inputs, None)] * 300, key=key)
    exact = np.linalg.inv(np.kron(inputs.T @ inputs / 40, np.eye(3)))
    found = dense.inverse_matrix(estimator, state, params)
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


def test_kfac_takes_a_convolution_as_a_matrix(x64, key):
    """(3, 3, 2, 4) as (18, 4): the same numbers as the leaf in that shape."""
    patches = jax.random.normal(key, (10, 18))
    labels = jnp.arange(10) % 4
    results = []
    for shape in ((3, 3, 2, 4), (18, 4)):
        model = flj.Model(lambda w, x: x @ w.reshape(18, 4), flj.likelihoods.categorical())
        params = jax.random.normal(key, (18, 4)).reshape(shape)
        estimator = flj.inverse.kfac(model, DAMPING, labels="empirical")
        state = flj.fit(estimator, params, [(patches, labels)], key=key)
        results.append(dense.inverse_diagonal(estimator, state, params))
    np.testing.assert_allclose(*results, rtol=1e-9)


def test_kfac_in_blocks_that_do_not_divide_is_positive_and_has_its_own_diagonal(x64, key):
    params, batch = problem(key)
    estimator = flj.inverse.kfac(MODEL, DAMPING, cap=2)
    state = flj.fit(estimator, params, [batch], key=key)
    matrix = dense.inverse_matrix(estimator, state, params)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-9, atol=1e-9)
    assert np.linalg.eigvalsh(matrix).min() > 0
    diagonal = dense.inverse_diagonal(estimator, state, params)
    np.testing.assert_allclose(diagonal, np.diag(matrix), rtol=1e-9)


def test_a_damping_below_rounding_leaves_kfac_finite_and_positive(key):
    """Two examples leave factors of rank two, whose other eigenvalues are rounding alone."""
    params = dense.mlp_params(key, (30, 20, 3))
    inputs = 100 * jax.random.normal(key, (2, 30))
    estimator = flj.inverse.kfac(MODEL, 1e-20)
    state = flj.fit(estimator, params, [(inputs, None)], key=key)
    product = dense.jitted(estimator.multiply)(state, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(product))
    assert np.dot(dense.ravel(product), dense.ravel(params)) > 0


def test_diagonal_is_the_mean_of_squares(x64, key):
    params, batch = problem(key)
    estimator = flj.inverse.diagonal(MODEL, DAMPING, labels="empirical")
    state = flj.fit(estimator, params, cut(batch, 8), key=key)
    squares = np.mean(dense.gradients(MODEL, params, batch) ** 2, axis=0)
    found = dense.inverse_diagonal(estimator, state, params)
    np.testing.assert_allclose(found, 1 / (squares + DAMPING), rtol=1e-10)


def test_diagonal_of_sampled_labels_is_that_of_the_true_fisher(x64, key):
    params, (inputs, labels) = problem(key)
    estimator = flj.inverse.diagonal(MODEL, DAMPING)
    state = flj.fit(estimator, params, [(inputs, None)] * 400, key=key)
    exact = np.diag(dense.exact_fisher(MODEL, params, (inputs, labels)))
    found = 1 / dense.inverse_diagonal(estimator, state, params) - DAMPING
    np.testing.assert_allclose(found, exact, atol=0.1 * exact.max())


@pytest.mark.parametrize("name", ["kfac", "diagonal"])
def test_gradients_that_are_not_finite_count_for_nothing(x64, key, name):
    params, (inputs, labels) = problem(key)
    estimator = getattr(flj.inverse, name)(MODEL, DAMPING, labels="empirical")
    bad = inputs.at[3].set(jnp.inf)
    update = jax.jit(estimator.update)
    state = update(estimator.init(params), params, (bad, labels), key)
    good = tuple(jnp.delete(x, 3, axis=0) for x in (inputs, labels))
    without = jax.jit(estimator.update)(estimator.init(params), params, good, key)
    assert int(state.skipped) == 1
    pair = [dense.inverse_diagonal(estimator, s, params) for s in (state, without)]
    np.testing.assert_allclose(*pair, rtol=1e-9)


@pytest.mark.parametrize("name", ["kfac", "diagonal"])
def test_bad_arguments_are_refused_at_once(key, name):
    make = getattr(flj.inverse, name)
    with pytest.raises(ValueError, match="damping must be a positive finite number, got -1"):
        make(MODEL, -1)
    with pytest.raises(ValueError, match="labels must be one of empirical, sampled, got 'none'"):
        make(MODEL, labels="none")
    with pytest.raises(ValueError, match="examples_per_chunk must be a whole number of at least 1"):
        make(MODEL, examples_per_chunk=0)
    if name == "kfac":
        with pytest.raises(
            ValueError, match="cap must be a whole number of at least 1 or None, got 0"
        ):
            make(MODEL, cap=0)
    params, (inputs, _) = problem(key)
    with pytest.raises(ValueError, match="must have labels for 'empirical'"):
        flj.fit(make(MODEL, labels="empirical"), params, [(inputs, None)], key=key)


@pytest.mark.parametrize("cap", [None, 2])
def test_a_prepared_state_is_the_same_inverse(x64, key, cap):
    params, batch = problem(key)
    estimator = flj.inverse.kfac(MODEL, DAMPING, cap=cap)
    state = flj.fit(estimator, params, [batch], key=key)
    prepared = jax.jit(estimator.prepare)(state, params)
    pairs = [
        [dense.inverse_matrix(estimator, s, params) for s in (state, prepared)],
        [dense.inverse_diagonal(estimator, s, params) for s in (state, prepared)],
    ]
    for plain, fast in pairs:
        np.testing.assert_allclose(fast, plain, rtol=1e-9, atol=1e-12 * np.abs(plain).max())


def test_a_prepared_state_has_no_decomposition_left_to_do(key):
    params, batch = problem(key)
    estimator = flj.inverse.kfac(MODEL, DAMPING)
    state = flj.fit(estimator, params, [batch], key=key)
    texts = [
        str(jax.make_jaxpr(f)(s, params))
        for s in (state, dense.jitted(estimator.prepare)(state, params))
        for f in (estimator.multiply, estimator.diagonal)
    ]
    assert ["cholesky" in text for text in texts] == [True, True, False, False]


def test_a_kernel_of_one_weight_has_its_own_number(x64, key):
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = jax.random.normal(key, (20, 1))
    batch = (inputs, 2 * inputs)
    params = jnp.ones((1, 1))
    estimator = flj.inverse.kfac(model, DAMPING, labels="empirical")
    state = flj.fit(estimator, params, [batch], key=key)
    square = np.mean(np.asarray(inputs) ** 4)  # of the gradient (1 - 2) x²
    np.testing.assert_allclose(estimator.multiply(state, params), 1 / (square + DAMPING))
