"""Convolutions that XLA for the CPU runs slowly, as shifts and products.

`jax.vmap` turns the gradient of a kernel into a convolution with a group for every example.  XLA
for the CPU runs some convolutions with groups by plain loops, hundreds of times slower than its
library for linear algebra: those with groups of the batch (gradients of a grouped kernel), in
double precision, with three spatial axes, and inside loops.  Here they are written as one product
for every position of the smaller of the window and the output.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _jaxpr
from fishleg_jax._devices import mesh
from fishleg_jax._jit import is_traced

MOST_POSITIONS = 49  # of a 7x7 kernel; the time to compile grows with them
SMALL_GROUP = 16  # weights at a position: with more of them XLA's own convolution is as fast


def in_fast_groups(function: Callable, shared: Any, examples: Any) -> Any:
    """`function(shared, examples)` with slow convolutions replaced, where it runs on the CPU.

    Under Explicit axes nothing is replaced: a model's user has chosen how it is sharded.

    Args:
        function: of a tree of arrays, which it may look at where they are not traced, and another.
        shared: the first tree.
        examples: the second tree.
    """
    if not _pays((shared, examples)):
        return function(shared, examples)
    of_examples = functools.partial(function, shared)
    return _jaxpr.with_replaced(of_examples, replacement)(examples)


def with_fast_groups(function: Callable) -> Callable:
    """A function of arrays with slow convolutions replaced, where it runs on the CPU."""

    def fast(*arguments: Any) -> Any:
        replaced = _pays(arguments) and is_traced(arguments)
        run = _jaxpr.with_replaced(function, replacement) if replaced else function
        return run(*arguments)

    return fast


def _pays(arrays: Any) -> bool:
    """Whether XLA is the one for the CPU, and free to lay out arrays as it likes."""
    explicit = mesh.explicit(jax.sharding.get_abstract_mesh())
    explicit |= mesh.explicit_mesh(arrays) is not None
    return jax.default_backend() == "cpu" and not explicit


def replacement(equation: Any, in_loop: bool) -> Callable[..., jax.Array] | None:
    """A faster function for a convolution; None for one to keep, and for any other operation."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    params = equation.params
    groups = max(params["feature_group_count"], params["batch_group_count"])
    (lhs, rhs), out = (x.aval for x in equation.invars), equation.outvars[0].aval
    is_real = jnp.issubdtype(out.dtype, jnp.floating) and lhs.dtype == rhs.dtype
    if groups == 1 or not is_real or 0 in (lhs.size, rhs.size, out.size):
        return None
    _, rhs_spec, out_spec = params["dimension_numbers"]
    window = math.prod(rhs.shape[i] for i in rhs_spec[2:])
    positions = math.prod(out.shape[i] for i in out_spec[2:])
    weights = rhs.size // (groups * window)
    of_batch = params["batch_group_count"] > 1
    slow = of_batch or in_loop or out.dtype == jnp.float64 or lhs.ndim > 4
    small = window <= positions and weights <= SMALL_GROUP
    if min(window, positions) <= MOST_POSITIONS and (slow or small):
        return functools.partial(_products, **_options(params))
    return functools.partial(_groups_of_features, **_options(params)) if of_batch else None


OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


def _options(params: dict[str, Any]) -> dict[str, Any]:
    """The options of a convolution, which are those of the functions below."""
    return {name: params[name] for name in OPTIONS}


@functools.partial(jax.jit, static_argnames=OPTIONS)
def _groups_of_features(lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
    """A convolution with groups of the batch as one with as many groups of features."""
    groups, (lhs_spec, *others) = options["batch_group_count"], options["dimension_numbers"]
    # batch and features first, then (groups, batch, features) becomes (batch, groups x features)
    lhs = lhs.transpose(lhs_spec)
    lhs = lhs.reshape(groups, -1, *lhs.shape[1:]).swapaxes(0, 1)
    lhs = lhs.reshape(lhs.shape[0], -1, *lhs.shape[3:])
    numbers = jax.lax.ConvDimensionNumbers(tuple(range(lhs.ndim)), *others)
    options |= {"batch_group_count": 1, "feature_group_count": groups, "dimension_numbers": numbers}
    return jax.lax.conv_general_dilated(lhs, rhs, **options)


@functools.partial(jax.jit, static_argnames=OPTIONS)
def _products(lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
    """A convolution as one product for each position of the window or of the output."""
    lhs_spec, rhs_spec, out_spec = options["dimension_numbers"]
    groups = max(options["feature_group_count"], options["batch_group_count"])
    # lhs as (batch, groups, features, space), rhs as (groups, results, features, window)
    lhs, rhs = lhs.transpose(lhs_spec), rhs.transpose(rhs_spec)
    if options["batch_group_count"] > 1:
        lhs = lhs.reshape(groups, -1, *lhs.shape[1:]).swapaxes(0, 1)
    else:
        lhs = lhs.reshape(lhs.shape[0], groups, -1, *lhs.shape[2:])
    rhs = rhs.reshape(groups, -1, *rhs.shape[1:])
    holes = zip(options["padding"], options["lhs_dilation"], strict=True)
    pads = [(before, after, hole - 1) for (before, after), hole in holes]
    lhs = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0)] * 3 + pads)
    strides, dilation = options["window_strides"], options["rhs_dilation"]
    window = rhs.shape[3:]
    sizes = zip(lhs.shape[3:], window, strides, dilation, strict=True)
    output = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes]
    kind = {
        "precision": options["precision"],
        "preferred_element_type": options["preferred_element_type"] or lhs.dtype,
    }
    # one channel for each, of one example for a kernel's gradient: nothing to contract
    single = rhs.shape[1] == rhs.shape[2] == 1
    if math.prod(window) <= math.prod(output):
        total = 0
        for place in itertools.product(*map(range, window)):
            part = _picked(lhs, place, dilation, output, strides)
            kernel = rhs[(..., *place)]
            if single:
                kernel = kernel.reshape(groups, 1, *[1] * len(window))
                total += (part * kernel).astype(kind["preferred_element_type"])
            else:
                total += jnp.einsum("ngc...,goc->ngo...", part, kernel, **kind)
        out = total
    else:
        rhs = rhs.reshape(*rhs.shape[:3], -1)
        parts = []
        for place in itertools.product(*map(range, output)):
            part = _picked(lhs, place, strides, window, dilation)
            part = part.reshape(*part.shape[:3], -1)
            parts.append(jnp.einsum("ngck,gock->ngo", part, rhs, **kind))
        out = jnp.stack(parts, axis=-1)
    out = out.reshape(lhs.shape[0], -1, *output)
    return out.transpose([out_spec.index(axis) for axis in range(out.ndim)])


def _picked(x: jax.Array, place: Any, steps: Any, sizes: Any, strides: Any) -> jax.Array:
    """Every `strides`-th number along the axes of space, as many as `sizes`, from a position."""
    begin = [i * step for i, step in zip(place, steps, strict=True)]
    axes = zip(begin, sizes, strides, strict=True)
    end = [b + (size - 1) * stride + 1 for b, size, stride in axes]
    return jax.lax.slice(x, [0] * 3 + begin, [*x.shape[:3], *end], [1] * 3 + [*strides])
