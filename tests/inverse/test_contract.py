"""What every `InverseFisher` keeps to, as a table: a new estimate is one more row.

Rows are not multiplied with dtypes and pytrees: some rows go through these (`DTYPE_ROWS` and
`test_contract_pytrees.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from tests import dense
from tests.marks import some_slow

fishleg = functools.partial(flj.inverse.fishleg, damping=0.1)
learner = functools.partial(fishleg, learn=True, start=4, updates=6)

ROWS = {
    "identity": lambda model: flj.inverse.identity(),
    "fishleg": fishleg,
    "fishleg, learning": learner,
    "fishleg, diagonal, automatic damping": functools.partial(
        fishleg, damping=None, factors=factors.diagonal
    ),
    "fishleg, kronecker, small blocks": functools.partial(
        learner, factors={"^b/kernel": factors.convolution, "kernel": factors.kronecker}, cap=2
    ),
    "fishleg, block_diagonal, joined bias": functools.partial(
        learner, factors=factors.block_diagonal, cap=5, join_bias="^d/kernel"
    ),
    "fishleg, low rank": functools.partial(fishleg, factors=factors.low_rank, cap=2),
    "fishleg, full": functools.partial(fishleg, factors=factors.full),
    "woodfisher": lambda model: flj.inverse.woodfisher(model, 0.1, gradients=60),
    "woodfisher, blocks": lambda model: flj.inverse.woodfisher(
        model, 0.1, gradients=70, block_size=5
    ),
    "mfac": lambda model: flj.inverse.mfac(model, 0.1, window=30),
    "mfac, leaves": lambda model: flj.inverse.mfac(
        model, 0.1, window=10, block_size="leaf", examples_per_gradient=2
    ),
    "kfac": lambda model: flj.inverse.kfac(model, 0.1),
    "diagonal": lambda model: flj.inverse.diagonal(model, 0.1),
}
# what takes long to compile goes by few rows
FEW_ROWS = ("identity", "fishleg, learning", "woodfisher, blocks", "mfac")
DTYPE_ROWS = [
    ("identity", "bfloat16"),
    ("identity", "float64"),
    ("fishleg", "bfloat16"),
    ("fishleg, kronecker, small blocks", "float64"),
    ("woodfisher, blocks", "bfloat16"),
    ("mfac", "float64"),
    ("kfac", "bfloat16"),
    ("diagonal", "float64"),
]
# variants of others, which take long to compile
VARIANTS = (
    "fishleg, kronecker, small blocks",
    "fishleg, block_diagonal, joined bias",
    "woodfisher, blocks",
    "mfac, leaves",
)


rows, few_rows = (
    pytest.mark.parametrize("row", some_slow(names, lambda row: row in VARIANTS))
    for names in (ROWS, FEW_ROWS)
)


def predict(params, x):
    """A layer with a kernel of three axes (spatial, in, out), and a dense one."""
    hidden = jnp.einsum("nsi,sio->no", x, params["b"]["kernel"]) + params["b"]["bias"]
    return jnp.tanh(hidden) @ params["d"]["kernel"] + params["d"]["bias"]


MODEL = flj.Model(predict, flj.likelihoods.categorical())


class Fit(NamedTuple):
    estimator: flj.InverseFisher
    params: Any
    batch: Any
    update: Any
    state: Any


def problem(dtype):
    shapes = {"b": {"kernel": (2, 3, 4), "bias": (4,)}, "d": {"kernel": (4, 3), "bias": (3,)}}
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    params = dense.random_like(jax.random.key(0), zeros, 0.5)
    inputs = jax.random.normal(jax.random.key(1), (10, 2, 3), dtype)
    return params, (inputs, jnp.arange(10) % 3)


def keys():
    return jax.random.split(jax.random.key(3), 7)


def fit(row, dtype=jnp.float32):
    """Seven jitted updates, which go through every phase."""
    estimator = ROWS[row](MODEL)
    params, batch = problem(dtype)
    update, state = jax.jit(estimator.update), estimator.init(params)
    for key in keys():
        state = update(state, params, batch, key)
    return Fit(estimator, params, batch, update, state)


cached = functools.lru_cache(fit)


def assert_close(x, y, rtol=1e-3):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()), x, y
    )


@rows
def test_state_is_a_pytree_of_arrays(row):
    estimator, params, _, _, state = cached(row)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    start = estimator.init(params)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (start, state)]
    assert shapes[0] == shapes[1]
    # from shapes only
    abstract = jax.eval_shape(estimator.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(start)
    # no two leaves in one place, or a training step could not be given the memory of its state
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(start) if x.size]
    assert len(set(places)) == len(places)


@rows
def test_an_update_keeps_dtypes_with_64_bits(row):
    """Or a loop could not carry the state; counts are what turns into int64."""
    with jax.enable_x64(True):
        estimator, (params, batch) = ROWS[row](MODEL), problem(jnp.float64)
        before = jax.eval_shape(estimator.init, params)
        after = jax.eval_shape(estimator.update, before, params, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param("fishleg", marks=pytest.mark.slow),
        pytest.param("fishleg, learning", marks=pytest.mark.slow),
        pytest.param("woodfisher, blocks", marks=pytest.mark.slow),
        pytest.param("mfac", marks=pytest.mark.slow),
        "identity",
        "diagonal",
    ],
)
def test_jit_changes_nothing(row):
    """One update from the same state: where frames are made, and while it learns.

    Not several: eigenvectors of equal eigenvalues are arbitrary, and what is learned is in them.
    """
    estimator, params, batch, update, state = cached(row)
    state = estimator.init(params)
    for i, key in enumerate(keys()):
        after = update(state, params, batch, key)
        if i in (1, 5):
            plain = estimator.update(state, params, batch, key)
            assert_close(estimator.multiply(plain, params), estimator.multiply(after, params))
            assert_close(estimator.diagonal(plain, params), estimator.diagonal(after, params))
        state = after
    functions = estimator.multiply, estimator.diagonal
    assert_close(
        [jax.jit(f)(state, params) for f in functions], [f(state, params) for f in functions]
    )


@rows
def test_no_recompilation(row):
    """Nor for another key, another state, another batch of the shape, or another damping."""
    estimator, params, batch, update, state = cached(row)
    assert update._cache_size() == 1
    if hasattr(state, "damping"):
        state = state._replace(damping=state.damping * 2)
    other = jax.tree.map(lambda x: x[::-1], batch)
    update(state, jax.tree.map(lambda x: 2 * x, params), other, jax.random.key(9))
    assert update._cache_size() == 1
    multiply = dense.jitted(estimator.multiply)
    multiply(state, params)
    compiled = multiply._cache_size()
    multiply(estimator.init(params), params)
    assert multiply._cache_size() == compiled


@few_rows
def test_vmap_over_seeds(row):
    estimator, params, batch, update, state = cached(row)
    seeds = jax.random.split(jax.random.key(5), 3)

    def product(key):
        return estimator.multiply(update(state, params, batch, key), params)

    together, alone = jax.jit(jax.vmap(product))(seeds), jax.jit(product)
    for i, key in enumerate(seeds):
        assert_close(jax.tree.map(lambda x: x[i], together), alone(key))  # noqa: B023


@rows
def test_multiply_is_a_positive_definite_matrix(row):
    """And linear: a matrix of columns of the identity stands for it; `diagonal` is its diagonal."""
    estimator, params, _, _, state = cached(row)
    matrix = dense.inverse_matrix(estimator, state, params)
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5 * scale)
    assert np.linalg.eigvalsh(matrix).min() > 1e-5 * scale
    diagonal = dense.inverse_diagonal(estimator, state, params)
    np.testing.assert_allclose(diagonal, np.diag(matrix), rtol=1e-4)
    v = dense.random_like(jax.random.key(6), params)
    product = dense.ravel(dense.jitted(estimator.multiply)(state, v))
    np.testing.assert_allclose(product, matrix @ dense.ravel(v), atol=1e-4 * scale)


@rows
def test_masks_cut_rows_and_columns(row):
    """`E_K Q E_Kᵀ`, and a diagonal that is zero elsewhere."""
    estimator, params, _, _, state = cached(row)
    mask = jax.tree.map(
        lambda p: jax.random.bernoulli(jax.random.key(p.size), 0.6, p.shape), params
    )
    kept = dense.ravel(mask).astype(bool)
    matrix = dense.inverse_matrix(estimator, state, params)
    matrix = matrix * np.outer(kept, kept)
    found = dense.inverse_matrix(estimator, state, params, mask)
    np.testing.assert_allclose(found, matrix, atol=1e-5 * np.abs(matrix).max())
    diagonal = dense.inverse_diagonal(estimator, state, params, mask)
    np.testing.assert_allclose(diagonal, np.diag(matrix), rtol=1e-4)


@pytest.mark.parametrize("row, dtype", some_slow(DTYPE_ROWS, lambda pair: pair[0] in VARIANTS))
def test_dtypes(row, dtype):
    """Factors and products are in float32 or better whatever the weights are."""
    with jax.enable_x64(dtype == "float64"):
        estimator, params, _, _, state = fit(row, jnp.dtype(dtype))
        wide = {jnp.dtype("float64" if dtype == "float64" else "float32")}
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} <= wide
        for function in (estimator.multiply, estimator.diagonal):
            out = dense.jitted(function)(state, params)
            assert {x.dtype for x in jax.tree.leaves(out)} == wide
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))
            assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, params)
