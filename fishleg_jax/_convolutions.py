"""Convolutions that XLA for the CPU runs slowly, rewritten as shifts and products.

`jax.vmap` turns the gradient of a kernel into a convolution with one group per example.  XLA for
the CPU runs some grouped convolutions by plain loops, hundreds of times slower than its library for
linear algebra: those with batch groups (gradients of a grouped kernel), in double precision, with
three spatial axes, and inside loops.  Here they become one product for every position of the
smaller of the window and the output.
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

MOST_POSITIONS = 49  # as in a 7x7 kernel; compile time grows with the number of positions
SMALL_GROUP = 16  # weights per position; with more, XLA's own convolution is as fast


def in_fast_groups(function: Callable, shared: Any, examples: Any) -> Any:
    """Calls `function(shared, examples)` with slow convolutions replaced on the CPU.

    Under Explicit axes nothing is replaced: the model's user has chosen the sharding.

    Args:
        function: Function of two pytrees of arrays; it may read the first if that is not traced.
        shared: First pytree.
        examples: Second pytree.
    """
    if not _pays((shared, examples)):
        return function(shared, examples)
    of_examples = functools.partial(function, shared)
    return _jaxpr.with_replaced(of_examples, replacement)(examples)


def with_fast_groups(function: Callable) -> Callable:
    """Returns a function of arrays with slow convolutions replaced on the CPU."""

    def fast(*arguments: Any) -> Any:
        replaced = _pays(arguments) and is_traced(arguments)
        run = _jaxpr.with_replaced(function, replacement) if replaced else function
        return run(*arguments)

    return fast


def _pays(arrays: Any) -> bool:
    """Whether to replace convolutions: on the CPU, and without Explicit axes."""
    explicit = mesh.explicit(jax.sharding.get_abstract_mesh())
    explicit |= mesh.explicit_mesh(arrays) is not None
    return jax.default_backend() == "cpu" and not explicit


def replacement(equation: Any, in_loop: bool) -> Callable[..., jax.Array] | None:
    """Returns a faster function for a slow convolution; None for other operations."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    params = equation.params
    groups = max(params["feature_group_count"], params["batch_group_count"])
    (lhs, rhs), out = (x.aval for x in equation.invars), equation.outvars[0].aval
    # leave ungrouped, complex, mixed and empty convolutions alone
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
    """Options of a convolution, in the form the functions below take."""
    return {name: params[name] for name in OPTIONS}


@functools.partial(jax.jit, static_argnames=OPTIONS)
def _groups_of_features(lhs: jax.Array, rhs: jax.Array, **options: Any) -> jax.Array:
    """Runs a convolution with batch groups as one with the same number of feature groups."""
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
    """Runs a convolution as one product per position of the window or of the output."""
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
    # sizes of the window and of the output
    strides, dilation = options["window_strides"], options["rhs_dilation"]
    window = rhs.shape[3:]
    sizes = zip(lhs.shape[3:], window, strides, dilation, strict=True)
    output = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes]
    kind = {
        "precision": options["precision"],
        "preferred_element_type": options["preferred_element_type"] or lhs.dtype,
    }
    # depthwise (for a kernel's gradient, of one example): one feature and one result per group,
    # so there is no axis to contract
    single = rhs.shape[1] == rhs.shape[2] == 1
    # loop over the smaller of the window and the output, and sum or stack the products
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
    # merge the groups, and restore the layout of the output
    out = out.reshape(lhs.shape[0], -1, *output)
    return out.transpose([out_spec.index(axis) for axis in range(out.ndim)])


def _picked(x: jax.Array, place: Any, steps: Any, sizes: Any, strides: Any) -> jax.Array:
    """Takes `sizes` numbers along the spatial axes, every `strides`-th one, from a position."""
    begin = [i * step for i, step in zip(place, steps, strict=True)]
    axes = zip(begin, sizes, strides, strict=True)
    end = [b + (size - 1) * stride + 1 for b, size, stride in axes]
    return jax.lax.slice(x, [0] * 3 + begin, [*x.shape[:3], *end], [1] * 3 + [*strides])
