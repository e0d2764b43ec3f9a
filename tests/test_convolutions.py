"""Convolutions with groups: per-example gradients in an equal, faster way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    convolve = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=numbers, **options
    )  # fmt: skip
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


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_xla(x64, seed):
    """Forwards, and gradients example by example, for random shapes and options."""
    convolve, lhs, rhs = random_convolution(seed)
    if convolve(lhs, rhs).size == 0:
        pytest.skip("an empty result")
    gradient = jax.grad(lambda pair, scale: jnp.sin(convolve(pair[0] * scale, pair[1])).sum())
    rows = jax.vmap(gradient, (None, 0))
    found, replaced = replaced_operations(rows, (lhs, rhs), jnp.array([0.3, 0.5, 0.9]))
    assert replaced
    expected = jax.jit(rows)((lhs, rhs), jnp.array([0.3, 0.5, 0.9]))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)
