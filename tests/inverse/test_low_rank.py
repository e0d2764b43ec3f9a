"""Low-rank factors, a few eigenvectors and shared eigenvalues, against dense algebra."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._kronecker import algebra, frames, low_rank
from tests.dense import matrix_of

GAMMA = 0.3
SHAPES = [((5, 4), 2), ((2, 2, 3), 3), ((3, 5), None)]  # of the leaf, and the number of vectors


@functools.partial(jax.jit, static_argnums=0)
def dense(factor, frame):
    """Q from its products with the columns of the identity, and its diagonal."""
    multiply = functools.partial(algebra.multiply, factor, frame, frames.NOT_LEARNED, GAMMA)
    q = jax.vmap(multiply)(jnp.eye(math.prod(factor.axes))).T
    return q, algebra.diagonal_of(factor, frame, frames.NOT_LEARNED, GAMMA).reshape(-1)


@pytest.fixture(params=SHAPES, ids=str)
def followed(request, x64):
    """A factor, Fisher samples of uneven size, and a frame after many iterations on these."""
    shape, cap = request.param
    factor = factors.low_rank(shape, cap)
    n, m = factor.axes
    scale = np.linspace(0.1, 2, n)[:, None] * np.linspace(0.5, 3, m)
    samples = jnp.asarray(np.random.default_rng(0).normal(size=(200, n, m)) * scale)

    @jax.jit
    def iterate(frame):
        moments = low_rank.mean_moments(factor, frame, samples)
        return low_rank.turn(factor, frame, moments)[0]

    frame = frames.empty_frame(factor, jnp.float64)
    for _ in range(200):
        frame = iterate(frame)
    spectrum = low_rank.mean_spectrum(factor, frame, samples)
    return factor, samples, frame._replace(spectrum=spectrum)


def test_the_iteration_finds_the_leading_eigenvectors(followed):
    factor, samples, frame = followed
    for axis, vectors in enumerate(frame.vectors):
        unfolded = np.moveaxis(np.asarray(samples), axis + 1, 0).reshape(factor.axes[axis], -1)
        leading = np.linalg.eigh(unfolded @ unfolded.T)[1][:, -vectors.shape[1] :]
        np.testing.assert_allclose(
            vectors @ vectors.T, leading @ leading.T, atol=1e-6, err_msg=str(axis)
        )


def test_q_is_the_inverse_of_the_fisher_averaged_over_its_parts(followed):
    factor, samples, frame = followed
    n, m = factor.axes
    q, diagonal = dense(factor, frame)
    flat = np.asarray(samples).reshape(len(samples), -1)
    fisher = flat.T @ flat / len(flat)
    # projections onto every part of the space: each gets the mean of the Fisher's diagonal there
    sides = []
    for vectors, size in zip(frame.vectors, (n, m), strict=True):
        v = np.asarray(vectors)
        sides.append([np.outer(x, x) for x in v.T] + [np.eye(size) - v @ v.T])
    expected = np.zeros((n * m, n * m))
    for left in sides[0]:
        for right in sides[1]:
            part = np.kron(left, right)
            number = np.trace(part)
            if number > 1e-9:
                expected += part * np.sum(part * fisher) / number
    np.testing.assert_allclose(np.linalg.inv(q) - GAMMA * np.eye(n * m), expected, atol=1e-8)
    np.testing.assert_allclose(diagonal, np.diag(q), rtol=1e-9)
    np.testing.assert_allclose(low_rank.trace(factor, frame), np.trace(fisher), rtol=1e-9)
    undamped = algebra.fisher_diagonal_of(factor, frame).reshape(-1)
    np.testing.assert_allclose(undamped, np.diag(expected), atol=1e-9)


def test_a_turn_keeps_the_fisher_as_seen_from_the_new_vectors(followed):
    factor, _, frame = followed
    q, _ = dense(factor, frame)
    fisher = np.linalg.inv(q) - GAMMA * np.eye(len(q))
    rng = np.random.default_rng(1)
    moments = tuple(jnp.asarray(rng.normal(size=v.shape)) for v in frame.vectors)
    turned, _ = low_rank.turn(factor, frame, moments)
    both = np.kron(*turned.vectors)
    inside = np.diag(both.T @ fisher @ both).reshape(low_rank.ranks(factor))
    np.testing.assert_allclose(turned.spectrum[:-1, :-1], inside, atol=1e-9)
    np.testing.assert_allclose(
        low_rank.trace(factor, turned), low_rank.trace(factor, frame), rtol=1e-9
    )


def test_an_estimate_with_all_vectors_is_that_of_whole_spectral_factors(x64):
    """On the same Fisher samples; both have the moments' eigenvectors, and their mean squares."""
    model = flj.Model(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], flj.likelihoods.gaussian())
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    params = jax.tree.map(lambda x: x * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)
    batch = (jax.random.normal(jax.random.key(0), (32, 3)), None)
    found = {}
    for name, structure in (("low", factors.low_rank), ("whole", factors.spectral)):
        if name == "whole":
            structure = functools.partial(factors.spectral, sandwich=False)
        estimator = flj.inverse.fishleg(model, GAMMA, factors=structure, cap=None)
        update, state = jax.jit(estimator.update), estimator.init(params)
        for _ in range(64):  # the same batch and labels, so that only the iteration goes on
            state = update(state, params, batch, jax.random.key(1))
        found[name] = matrix_of(lambda v: estimator.multiply(state, v), params)  # noqa: B023
    np.testing.assert_allclose(found["low"], found["whole"], rtol=0.05, atol=0.02)


def test_the_rank_is_at_most_the_size_and_vectors_are_diagonal():
    assert low_rank.ranks(factors.low_rank((3, 100), 8)) == (3, 8)
    assert factors.low_rank((7,), 4) == factors.diagonal((7,))
    with pytest.raises(ValueError, match="cap must be at least 1 or None, got 0"):
        factors.low_rank((3, 4), 0)


def test_learning_is_refused():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    estimator = flj.inverse.fishleg(model, 0.1, factors=factors.low_rank, learn=True)
    with pytest.raises(ValueError, match="learn must be False with factors.low_rank"):
        estimator.init(jnp.ones((3, 2)))


@pytest.mark.parametrize("n, rank", [(1, 1), (2, 2), (9, 9), (50, 7), (784, 64)])
def test_the_first_vectors_are_orthonormal_and_incoherent(x64, n, rank):
    vectors = low_rank._incoherent(jax.random.key(0), n, rank, jnp.dtype(jnp.float64))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-12)
    assert np.abs(vectors).max() <= (2 / n) ** 0.5 + 1e-12  # no axis has more than its share
