"""Blocks of every estimate for the tiles of a pattern, against dense algebra."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from fishleg_jax import _tiles
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._kronecker import blocks as _kronecker_blocks
from fishleg_jax.inverse._kronecker import frames
from fishleg_jax.inverse._kronecker.units import make_units
from tests import dense

fishleg = functools.partial(flj.inverse.fishleg, damping=0.1)

ROWS = {
    "fishleg": fishleg,
    "fishleg, kronecker": functools.partial(
        fishleg,
        factors={"^b/kernel": factors.convolution, "kernel": factors.kronecker},
        cap=3,
    ),
    "fishleg, spectral and full": functools.partial(
        fishleg, factors={"^b/kernel": factors.spectral, "kernel": factors.full}, cap=3
    ),
    "fishleg, joined bias": functools.partial(
        fishleg, factors={"b/kernel": factors.diagonal}, join_bias="^d/kernel", cap=3
    ),
    "kfac": lambda model: flj.inverse.kfac(model, 0.1),
    "kfac, cap": lambda model: flj.inverse.kfac(model, 0.1, cap=3),
    "woodfisher": lambda model: flj.inverse.woodfisher(model, 0.1, gradients=20),
    "woodfisher, blocks": lambda model: flj.inverse.woodfisher(
        model, 0.1, gradients=20, block_size=5
    ),
    "mfac": lambda model: flj.inverse.mfac(model, 0.1, window=20),
    "mfac, leaves": lambda model: flj.inverse.mfac(model, 0.1, window=20, block_size="leaf"),
    "mfac, wide": lambda model: flj.inverse.mfac(model, 0.1, window=200),
}
LEARNED = ("fishleg, kronecker", "fishleg, spectral and full")
# tiles of "b/kernel" (2, 5, 4) and of "d/kernel" (4, 6); None for the biases
TILES = {
    "inputs": (None, (1, 2, 1), None, (4, 1)),
    "blocks": (None, (1, 2, 3), None, (3, 2)),
    "outputs": (None, (2, 5, 1), None, (4, 1)),
    "heads": (None, (2, 5, 2), None, (4, 2)),
    "input units": (None, (2, 1, 4), None, (1, 6)),
}
DENSE, IN_PIECES = ("inputs", "blocks", "outputs"), ("outputs", "heads", "input units")
# estimates whose Q is the inverse of F + γI, with F as they hold it
INVERTIBLE = ("fishleg", "woodfisher", "woodfisher, blocks", "mfac", "mfac, leaves", "mfac, wide")


def predict(params, x):
    hidden = jnp.einsum("nsi,sio->no", x, params["b"]["kernel"]) + params["b"]["bias"]
    return jnp.tanh(hidden) @ params["d"]["kernel"] + params["d"]["bias"]


MODEL = flj.Model(predict, flj.likelihoods.categorical())
SHAPES = {
    "b": {"bias": (4,), "kernel": (2, 5, 4)},
    "d": {"bias": (6,), "kernel": (4, 6)},
}


@functools.cache
def fitted(row):
    """Estimator, weights and state in float64, and its dense Q."""
    is_shape = lambda x: isinstance(x, tuple)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float64"), SHAPES, is_leaf=is_shape)
    params = dense.random_like(jax.random.key(0), shapes, 0.5)
    inputs = jax.random.normal(jax.random.key(1), (20, 2, 5))
    batch = inputs, jnp.arange(20) % 6
    estimator = ROWS[row](MODEL)
    state = flj.fit(estimator, params, [batch], key=jax.random.key(2))
    if row in LEARNED:  # as learning would leave it
        units = make_units(params, ROWS[row].keywords["factors"], False, 3)
        zero = {u.name: frames.zero_coordinates(u.factor, jnp.float64) for u in units}
        state = state._replace(average=dense.random_like(jax.random.key(3), zero, 0.3))
    return estimator, params, state


def reference(params, matrix, tile, leaf, product):
    """Quadratic form of every tile of a leaf, from the dense matrix."""
    flat, unravel = ravel_pytree(params)
    names = jax.tree.leaves(unravel(jnp.arange(flat.size)))
    places = np.asarray(_tiles.split(np.asarray(names[leaf]), tile)).astype(int)
    grid = places.shape[:-1]
    out = np.zeros(grid)
    for index in itertools.product(*map(range, grid)):
        own = places[index]
        w, block = np.asarray(flat)[own], matrix[np.ix_(own, own)]
        out[index] = w @ block @ w if product else w @ np.linalg.solve(block, w)
    return out


def forms(pieces, product):
    c, m = map(np.asarray, pieces)
    inner = (
        np.einsum("...ij,...j->...i", m, c) if product else np.linalg.solve(m, c[..., None])[..., 0]
    )
    return (c * inner).sum(axis=(-1, -2))


def all_blocks(estimator, state, params, fisher, most, monkeypatch):
    """Pieces by (tiles, leaf) of all tiles, compiled at once."""
    monkeypatch.setattr(_kronecker_blocks, "MOST", most)
    names = DENSE if most == 64 else IN_PIECES
    function = lambda s, p: {name: estimator.blocks(s, p, TILES[name], fisher) for name in names}
    found = jax.jit(function)(state, params)
    pieces = {(n, i): p for n, own in found.items() for i, p in enumerate(own) if p is not None}
    assert all(TILES[name][leaf] is not None for name, leaf in pieces)
    if most == 64:
        assert len(pieces) == 2 * len(names)
    return pieces


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("most", [64, pytest.param(2, marks=pytest.mark.slow)])
def test_blocks_are_those_of_the_dense_inverse(row, most, monkeypatch):
    estimator, params, state = fitted(row)
    matrix = dense.matrix_of(lambda v: estimator.multiply(state, v), params)
    if most == 2 and estimator.prepare is not None:
        state = estimator.prepare(state, params)
    pieces = all_blocks(estimator, state, params, False, most, monkeypatch)
    assert pieces
    for (name, leaf), own in pieces.items():
        expected = reference(params, matrix, TILES[name][leaf], leaf, False)
        np.testing.assert_allclose(forms(own, False), expected, rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", INVERTIBLE)
def test_blocks_of_the_fisher_are_those_of_the_dense_one(row, monkeypatch):
    estimator, params, state = fitted(row)
    inverse = dense.matrix_of(lambda v: estimator.multiply(state, v), params)
    matrix = np.linalg.inv(inverse) - float(state.damping) * np.eye(len(inverse))
    most = 2 if row == "fishleg" else 64
    pieces = all_blocks(estimator, state, params, True, most, monkeypatch)
    assert pieces
    for (name, leaf), own in pieces.items():
        expected = reference(params, matrix, TILES[name][leaf], leaf, True)
        np.testing.assert_allclose(forms(own, True), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", [row for row in ROWS if row not in INVERTIBLE])
def test_the_diagonal_of_the_fisher_blocks_is_that_of_the_fisher(row, monkeypatch):
    estimator, params, state = fitted(row)
    diagonal = jax.tree.leaves(estimator.fisher_diagonal(state, params))
    pieces = all_blocks(estimator, state, params, True, 64, monkeypatch)
    for (name, leaf), own in pieces.items():
        found = np.diagonal(own.matrices[..., 0, :, :], axis1=-2, axis2=-1)
        expected = _tiles.split(diagonal[leaf], TILES[name][leaf])
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("most", [64, 2])
def test_blocks_of_kfac_are_those_of_the_kronecker_product(most, monkeypatch):
    estimator, params, state = fitted("kfac")
    (first,), (second,) = (state.moments["d/kernel"][k] / state.count for k in (0, 1))
    product = np.kron(first, second) / np.trace(first[0] if first.ndim == 3 else first)
    matrix = np.zeros((74, 74))
    matrix[-24:, -24:] = product
    pieces = all_blocks(estimator, state, params, True, most, monkeypatch)
    for (name, leaf), own in pieces.items():
        if leaf == 3:
            expected = reference(params, matrix, TILES[name][3], 3, True)
            np.testing.assert_allclose(forms(own, True), expected, rtol=1e-8)


def test_stacked_layers_have_their_own_blocks():
    kernel = jax.random.normal(jax.random.key(0), (3, 4, 6))

    def predict(params, x):
        for layer in params["kernel"]:
            x = jnp.tanh(x @ layer)[:, :4]
        return x

    model = flj.Model(predict, flj.likelihoods.categorical())
    batch = jax.random.normal(jax.random.key(1), (16, 4)), jnp.arange(16) % 4
    for make in (fishleg, flj.inverse.kfac):
        estimator = make(model, damping=0.1, stacked="kernel")
        state = flj.fit(estimator, {"kernel": kernel}, [batch], key=jax.random.key(2))
        matrix = dense.matrix_of(
            lambda v, e=estimator, s=state: e.multiply(s, v), {"kernel": kernel}
        )
        for tile in ((1, 2, 1), (1, 4, 2)):
            blocks = jax.jit(functools.partial(estimator.blocks, tiles=(tile,), fisher=False))
            (pieces,) = blocks(state, {"kernel": kernel})
            expected = reference({"kernel": kernel}, matrix, tile, 0, False)
            np.testing.assert_allclose(forms(pieces, False), expected, rtol=2e-4)
