"""Every factor is a positive definite matrix, the one that its documentation says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_jax.inverse import factors
from fishleg_jax.inverse._kronecker import algebra, frames

spectral_of_three = functools.partial(factors.spectral, axes=3)

# (constructor, shape of the leaf, cap); blocks of at most 2 or 3 pad the axes of 5 and of 7
STRUCTURES = [
    (factors.diagonal, (2, 3), None),
    (factors.diagonal, (), None),
    (factors.kronecker, (3, 4), None),
    (factors.kronecker, (2, 2, 3), 2),
    (factors.kronecker, (5, 4), 3),
    (factors.kronecker, (1, 5), 3),
    (factors.convolution, (2, 2, 3, 2), None),
    (factors.convolution, (3, 5, 2), 2),
    (factors.spectral, (3, 4), None),
    (factors.spectral, (4, 4), 2),
    (factors.spectral, (5, 3), 3),
    (spectral_of_three, (3, 2, 4), None),
    (spectral_of_three, (1, 5, 2), 3),
    (factors.block_diagonal, (2, 5), None),
    (factors.block_diagonal, (7,), 3),
    (factors.full, (2, 3), 1),
]


def random_parts(factor, seed, scale):
    """A frame and coordinates that are as random as they may be."""
    rng = np.random.default_rng(seed)
    frame = frames.empty_frame(factor, jnp.float64)
    frame = factors.Frame(
        vectors=jax.tree.map(lambda x: np.linalg.qr(rng.normal(size=x.shape))[0], frame.vectors),
        values=jax.tree.map(lambda x: rng.exponential(size=x.shape), frame.values),
        spectrum=jax.tree.map(lambda x: rng.exponential(size=x.shape), frame.spectrum),
    )
    coordinates = jax.tree.map(
        lambda x: rng.uniform(-scale, scale, x.shape), frames.zero_coordinates(factor, jnp.float64)
    )
    return frame, coordinates


@functools.partial(jax.jit, static_argnums=0)
def dense_and_diagonal(factor, frame, coordinates, damping):
    """Q from its products with the columns of the identity, and what it says is its diagonal."""
    identity = jnp.eye(math.prod(factor.axes))
    multiply = functools.partial(algebra.multiply, factor, frame, coordinates, damping)
    return (
        jax.vmap(multiply)(identity).T,
        algebra.diagonal_of(factor, frame, coordinates, damping).reshape(-1),
    )


def documented(factor, frame, coordinates, damping):
    """`D (⊗R) E (⊗R)ᵀ D` with numpy; padding is cut off, so there is no E where there is some."""
    roots = []
    for axis, blocks in enumerate(factor.blocks):
        size = factor.axes[axis]
        if not blocks:
            roots.append(np.eye(size))
            continue
        root = np.asarray(frame.vectors[axis])
        if factor.triangles:
            triangle = np.asarray(coordinates.triangles[axis])
            gamma = algebra.axis_damping(factor, axis, damping)
            lower = [np.tril(t, -1) + np.diag(np.exp(np.diag(t))) for t in triangle]
            scale = (np.asarray(frame.values[axis]) + gamma) ** -0.5
            root = root * scale[:, None, :] @ np.stack(lower)
        roots.append(scipy.linalg.block_diag(*root)[:size])
    product = functools.reduce(np.kron, roots)
    middle = np.ones(product.shape[1])
    if factor.spectrum:
        middle = np.exp(coordinates.log_spectrum) / (np.asarray(frame.spectrum) + damping)
    outer = np.ones(product.shape[0])
    if factor.sandwich:
        outer = np.exp(np.asarray(coordinates.log_sandwich)).reshape(-1)
    product = outer[:, None] * product
    return product * middle.reshape(-1) @ product.T


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(STRUCTURES),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.floats(1e-6, 1e3),
)
def test_multiply_is_a_symmetric_positive_definite_matrix(structure, seed, scale, damping):
    """And `diagonal_of` is its diagonal.

    Coordinates of up to 3 make condition numbers that no eigenvalue survives in float64, so that
    strict definiteness is looked at along random vectors.
    """
    constructor, shape, cap = structure
    factor = constructor(shape, cap)
    with jax.enable_x64(True):
        parts = random_parts(factor, seed, scale)
        q, diagonal = map(np.asarray, dense_and_diagonal(factor, *parts, damping))
    assert np.isfinite(q).all() and (np.diag(q) > 0).all()
    np.testing.assert_allclose(diagonal, np.diag(q), rtol=1e-10)
    root = np.sqrt(np.diag(q))
    correlations = q / np.outer(root, root)
    np.testing.assert_allclose(correlations, correlations.T, atol=1e-10)
    assert np.linalg.eigvalsh(correlations).min() > -1e-12
    v = np.random.default_rng(seed).normal(size=(10, len(q))) / root
    assert (np.einsum("ni,ij,nj->n", v, q, v) > 0).all()


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_start_is_strictly_positive_definite(x64, constructor, shape, cap):
    """At zero coordinates Q is well conditioned: no direction may be lost, padded or not."""
    factor = constructor(shape, cap)
    q, _ = dense_and_diagonal(factor, *random_parts(factor, 0, 0.0), 0.5)
    eigenvalues = np.linalg.eigvalsh(q)
    assert eigenvalues.min() > 1e-4 * eigenvalues.max()


def is_padded(factor):
    return any(b * factor.block_size(k) > factor.axes[k] for k, b in enumerate(factor.blocks) if b)


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_multiply_is_the_documented_matrix(x64, constructor, shape, cap):
    factor = constructor(shape, cap)
    if factor.spectrum and is_padded(factor):
        assert constructor in (factors.spectral, spectral_of_three)
        return
    parts = random_parts(factor, 1, 1.0)
    q, _ = dense_and_diagonal(factor, *parts, 0.1)
    expected = documented(factor, *parts, 0.1)
    np.testing.assert_allclose(q, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_empty_frame_is_the_inverse_damping(x64, constructor, shape, cap):
    factor = constructor(shape, cap)
    parts = frames.empty_frame(factor, jnp.float64), frames.zero_coordinates(factor, jnp.float64)
    for damping in (1e-4, 30.0):
        q, diagonal = dense_and_diagonal(factor, *parts, damping)
        np.testing.assert_allclose(q * damping, np.eye(len(q)), atol=1e-10)
        np.testing.assert_allclose(diagonal * damping, 1, rtol=1e-10)


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_rescale_multiplies_by_a_number(x64, constructor, shape, cap):
    factor = constructor(shape, cap)
    frame, coordinates = random_parts(factor, 2, 1.0)
    q, _ = dense_and_diagonal(factor, frame, coordinates, 0.1)
    coordinates = frames.rescale(factor, coordinates, jnp.log(7.0))
    rescaled, _ = dense_and_diagonal(factor, frame, coordinates, 0.1)
    np.testing.assert_allclose(rescaled, 7 * q, atol=1e-10 * np.abs(q).max())


@pytest.mark.parametrize("constructor, shape, cap", STRUCTURES)
def test_no_block_is_larger_than_the_cap(constructor, shape, cap):
    factor = constructor(shape, cap)
    assert math.prod(factor.axes) == math.prod(shape)
    if cap is not None and constructor not in (factors.full, factors.diagonal):
        assert all(factor.block_size(k) <= cap for k in factor.dense_axes)


def test_axis_dampings_multiply_to_the_damping():
    factor = factors.convolution((9, 4, 6))
    dampings = [float(algebra.axis_damping(factor, k, 0.02)) for k in range(3)]
    assert math.prod(dampings) == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((), factors.diagonal(())),
        ((7,), factors.diagonal((7,))),
        ((7, 8), factors.spectral((7, 8), 2, cap_out=1, sandwich=False)),
        ((3, 7, 8), factors.spectral((3, 7, 8), 4, axes=3, sandwich=False)),
        ((3, 3, 7, 8), factors.spectral((3, 3, 7, 8), 4, axes=3, sandwich=False)),
    ],
)
def test_rule_by_shape(shape, expected):
    assert factors.by_shape(shape, 4) == expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: factors.kronecker((3,)), "shape must have 2 or more dimensions"),
        (lambda: factors.convolution((3, 4)), "shape must have 3 or more dimensions"),
        (lambda: factors.spectral((3, 4), axes=3), "shape must have 3 or more dimensions"),
        (lambda: factors.block_diagonal((3,), 0), "cap must be at least 1 or None, got 0"),
        (lambda: factors.kronecker((3, 4), -1), "cap must be at least 1 or None, got -1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [factors.kronecker, factors.spectral])
@pytest.mark.parametrize("shape, size", [((5, 7), 2), ((3, 8), 4), ((4, 6), 6)])
def test_products_with_all_axes_are_those_with_the_dense_matrix(x64, key, make, shape, size):
    """The last axis has a way of its own, which transposes whole rows of blocks."""
    factor = make(shape, size)
    matrices = [
        jax.random.normal(
            jax.random.fold_in(key, k), (factor.blocks[k], *[factor.block_size(k)] * 2)
        )
        for k in factor.dense_axes
    ]
    x = jax.random.normal(key, (3, *factor.padded))
    dense = [jax.scipy.linalg.block_diag(*matrix) for matrix in matrices]
    expected = jnp.einsum("ij,kl,njl->nik", *dense, x)
    found = jax.vmap(lambda x: algebra.apply(factor, matrices, x))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
