"""Frames that are made of gradient moments against the inverses that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fishleg_jax.inverse import factors
from fishleg_jax.inverse._kronecker import frames
from tests.inverse.test_factors import STRUCTURES, dense_and_diagonal


@functools.partial(jax.jit, static_argnums=0)
def framed(factor, samples):
    """The frame of mean second moments of samples, as the start of an estimate makes it."""
    frame = frames.empty_frame(factor, jnp.float64)
    moments = jax.vmap(functools.partial(frames.moments_of, factor))(samples)
    moments = jax.tree.map(lambda x: x.mean(0), moments)
    frame = frames.decompose(factor, frame, moments)
    squares = jax.vmap(functools.partial(frames.spectrum_of, factor, frame))(samples)
    return frame._replace(spectrum=jax.tree.map(lambda x: x.mean(0), squares))


def start(factor, samples, damping):
    coordinates = frames.zero_coordinates(factor, jnp.float64)
    return dense_and_diagonal(factor, framed(factor, samples), coordinates, damping)


def correlated(seed, examples, size):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(examples, size)) @ rng.normal(size=(size, size))


@pytest.mark.parametrize("examples", [4, 50])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_full_start_is_the_exact_inverse(x64, examples, damping):
    """Also with fewer examples than weights, where the damping alone makes it invertible."""
    samples = jnp.asarray(correlated(0, examples, 6))
    q, diagonal = start(factors.full((2, 3)), samples, damping)
    expected = np.linalg.inv(samples.T @ samples / examples + damping * np.eye(6))
    np.testing.assert_allclose(q, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=1e-9)


@pytest.mark.parametrize("cap", [2, 3, 4])
def test_block_diagonal_start_inverts_its_blocks(x64, cap):
    """A cap of 4 or 3 leaves a last block that is padded."""
    factor, samples = factors.block_diagonal((7,), cap), jnp.asarray(correlated(1, 40, 7))
    size = factor.block_size(0)
    block = np.arange(7) // size
    fisher = samples.T @ samples / 40 * (block[:, None] == block) + 0.1 * np.eye(7)
    q, diagonal = start(factor, samples, 0.1)
    np.testing.assert_allclose(q, np.linalg.inv(fisher), atol=1e-9)
    np.testing.assert_allclose(diagonal, np.diag(np.linalg.inv(fisher)), rtol=1e-9)


def test_diagonal_start(x64):
    samples = jnp.asarray(correlated(2, 40, 6))
    q, _ = start(factors.diagonal((2, 3)), samples, 0.1)
    np.testing.assert_allclose(q, np.diag(1 / ((samples**2).mean(0) + 0.1)), atol=1e-12)


def kronecker_samples(shape):
    """Samples whose second moment is a Kronecker product exactly: all columns of its root."""
    roots = [correlated(k, n, n) for k, n in enumerate(shape)]
    root = functools.reduce(np.kron, roots)
    fisher = root @ root.T
    return jnp.asarray(root.T * np.sqrt(len(root))).reshape(-1, *shape), fisher


@pytest.mark.parametrize(
    "constructor, shape",
    [
        (factors.kronecker, (3, 4)),
        (factors.kronecker, (1, 4)),
        (factors.spectral, (3, 4)),
        (factors.convolution, (2, 3, 4)),
        (functools.partial(factors.spectral, axes=3), (2, 3, 4)),
    ],
)
def test_start_is_exact_for_a_kronecker_fisher(x64, constructor, shape):
    """With a spectrum at any damping; with two factors that share it, as it vanishes."""
    samples, fisher = kronecker_samples(shape)
    factor = constructor(shape)
    damping = 0.1 if factor.spectrum else 1e-12 ** len(factor.dense_axes)
    q, _ = start(factor, samples, damping)
    product = q @ (fisher + damping * np.eye(len(fisher)))
    np.testing.assert_allclose(product, np.eye(len(fisher)), atol=1e-6)


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_start_loses_no_direction(x64, constructor, shape, cap):
    """Padding has zero moments; its eigenvectors must not push out those of data."""
    factor = constructor(shape, cap)
    samples = np.random.default_rng(0).normal(size=(200, *shape))
    q, diagonal = start(factor, samples, 0.1)
    eigenvalues = np.linalg.eigvalsh(q)
    # white samples: F is about I, and Q about a multiple of it
    assert eigenvalues.min() > 0.2 * eigenvalues.max()
    np.testing.assert_allclose(diagonal, np.diag(q), rtol=1e-10)


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_no_gradient_gives_the_inverse_damping(x64, constructor, shape, cap):
    """A dead leaf: moments of zero, no division by them."""
    factor = constructor(shape, cap)
    q, _ = start(factor, np.zeros((200, *shape)), 0.1)
    np.testing.assert_allclose(q, 10 * np.eye(len(q)), atol=1e-9)
