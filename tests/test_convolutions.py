"""Convolutions with groups: per-example gradients in an equal, faster way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax import _convolutions, _jaxpr


def random_convolution(seed):
    """A convolution with random options, and operands for it."""
    draw = np.random.default_rng(seed)
    space = 1 + seed % 3
    groups, batch_groups = [(2, 1), (1, 3), (4, 1), (1, 1)][seed % 4]
    features, results = draw.integers(1, 4, 2)
    whole = lambda low, high: tuple(int(x) for x in draw.integers(low, high, space))
    window, sizes = whole(1, 4), whole(4, 7)
    options = {
        "window_strides": whole(1, 3),
        "padding": tuple((int(a), int(b)) for a, b in draw.integers(-1, 3, (space, 2))),
        "lhs_dilation": whole(1, 3),
        "rhs_dilation": whole(1, 3),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    orders = [tuple(int(x) for x in draw.permutation(space + 2)) for _ in range(3)]
    numbers = jax.lax.ConvDimensionNumbers(*orders)
    shapes = [(2 * batch_groups, groups * features, *sizes)]
    shapes += [(groups * batch_groups * results, features, *window)]

    def operand(shape, order):
        placed = np.empty(space + 2, int)
        placed[list(order)] = shape
        return jnp.asarray(draw.normal(size=placed))

    lhs, rhs = (operand(*pair) for pair in zip(shapes, orders, strict=False))
    convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=numbers, **options)
    return convolve, lhs, rhs


def replaced_operations(function, *args):
    """The result with products, and whether any convolution was replaced."""
    found = []

    def count(equation, in_loop):
        function = _convolutions.replacement(equation, in_loop)
        if equation.primitive.name == "conv_general_dilated":
            found.append(function is not None)
        return function

    result = _jaxpr.with_replaced(function, count)(*args)
    return result, any(found)


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 7, 14])
def test_equal_to_xla(x64, seed):
    """Forwards, and gradients example by example, for random shapes and options."""
    convolve, lhs, rhs = random_convolution(seed)
    gradient = jax.grad(lambda pair, scale: jnp.sin(convolve(pair[0] * scale, pair[1])).sum())
    rows = jax.vmap(gradient, (None, 0))
    found, replaced = replaced_operations(rows, (lhs, rhs), jnp.array([0.3, 0.5, 0.9]))
    assert replaced
    expected = jax.jit(rows)((lhs, rhs), jnp.array([0.3, 0.5, 0.9]))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


def convolve(x, w, groups):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=groups
    )


def test_a_wide_kernel_keeps_one_convolution(x64):
    """Beyond the largest number of positions, groups of the batch become groups of features."""
    x, w = jax.random.normal(jax.random.key(0), (3, 60, 4)), jnp.ones((55, 1, 4))
    rows = jax.vmap(jax.grad(lambda w, x: jnp.sin(convolve(x[None], w, 4)).sum()), (None, 0))
    fast = _jaxpr.with_replaced(rows, _convolutions.replacement)
    assert "batch_group_count=12" in str(jax.make_jaxpr(rows)(w, x))
    found = str(jax.make_jaxpr(fast)(w, x))
    assert "batch_group_count=12" not in found
    assert "feature_group_count=12" in found
    np.testing.assert_allclose(fast(w, x), rows(w, x), atol=1e-10)


def in_scan(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(convolve(x, w, 4)), None), x, p[None])[0]


def in_cond(p, x):
    return jax.lax.cond(p.sum() > 0, lambda x: convolve(x, p, 4), jnp.sin, x)


SHARED = jax.jit(lambda p, x: jax.nn.relu(convolve(x, p, 4)))


@pytest.mark.parametrize(
    "predict",
    [SHARED, in_scan, in_cond, jax.checkpoint(lambda p, x: jnp.sin(convolve(x, p, 4)))],
    ids=["jit", "scan", "cond", "checkpoint"],
)
@pytest.mark.parametrize("how", [{}, {"examples_per_chunk": 4, "examples_per_gradient": 2}])
def test_convolutions_of_inner_functions_are_replaced(x64, predict, how, monkeypatch):
    """Gradients as they are without, and no convolution with groups of the batch left."""
    model = flj.Model(predict, flj.likelihoods.gaussian())
    x = jax.random.normal(jax.random.key(0), (8, 5, 4))
    w = jax.random.uniform(jax.random.key(1), (3, 1, 4))
    rows = functools.partial(flj.per_example_gradients, model, **how)
    traced = str(jax.make_jaxpr(rows)(w, (x, 0 * x)))
    assert "batch_group_count=" not in traced.replace("batch_group_count=1\n", "")
    found = jax.jit(rows)(w, (x, 0 * x))
    monkeypatch.setattr(_convolutions, "replacement", lambda equation, in_loop: None)
    np.testing.assert_allclose(found, jax.jit(lambda *a: rows(*a))(w, (x, 0 * x)), atol=1e-12)


def test_an_equal_call_compiles_nothing():
    """Outside of `jit`, too."""
    model = flj.Model(SHARED, flj.likelihoods.gaussian())
    batch = jnp.ones((8, 5, 4)), jnp.ones((8, 5, 4))
    flj.per_example_gradients(model, jnp.ones((3, 1, 4)), batch)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        import logging

        messages = []
        patch.setattr(logging.Logger, "handle", lambda self, r: messages.append(r.getMessage()))
        flj.per_example_gradients(model, jnp.ones((3, 1, 4)), batch)
    assert not [m for m in messages if m.startswith("Compiling")]


def test_ungrouped_convolutions_are_left_to_xla():
    """In single precision outside of loops, where XLA is as fast."""
    x, w = jnp.ones((3, 5, 4)), jnp.ones((3, 4, 4))
    rows = jax.vmap(jax.grad(lambda w, x: jnp.sin(convolve(x[None], w, 1)).sum()), (None, 0))
    assert not replaced_operations(rows, w, x)[1]
    assert replaced_operations(lambda w, x: jax.lax.map(lambda x: rows(w, x), x[None]), w, x)[1]


@pytest.mark.parametrize("kind", flj.fisher.KINDS)
def test_fisher_products_under_jit_are_those_of_xla(x64, key, kind):
    """There they are made of products, and eagerly of convolutions."""

    def predict(params, x):
        x = jax.lax.conv_general_dilated(
            x,
            params["depthwise"],
            (1, 1),
            "SAME",
            feature_group_count=4,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(x).mean(axis=(1, 2)) @ params["head"]

    keys = jax.random.split(key, 4)
    params = {
        "depthwise": jax.random.normal(keys[0], (3, 3, 1, 4)),
        "head": jax.random.normal(keys[1], (4, 3)),
    }
    batch = (jax.random.normal(keys[2], (5, 6, 6, 4)), jnp.arange(5) % 3)
    model = flj.Model(predict, flj.likelihoods.categorical())
    product = lambda p, b, v: flj.fisher_vector_product(model, p, b, v, kind=kind, key=keys[3])
    vector = jax.tree.map(jnp.cos, params)
    text = str(jax.make_jaxpr(product)(params, batch, vector))
    assert "conv_general_dilated" not in text
    plain, fast = product(params, batch, vector), jax.jit(product)(params, batch, vector)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), plain, fast)
    assert float(abs(plain["depthwise"]).max()) > 0
