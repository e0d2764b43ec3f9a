"""Floating-point operations of a function, counted from its trace: nothing is compiled or run.

XLA's own count knows neither how often a loop goes round before it is compiled nor what its
libraries do; here a `scan` counts as often as it is long, and factorisations by the usual formulas.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from fishleg_jax._jaxpr import functions, opened
from fishleg_jax.pruning.costs import IDENTITIES, MOVES, _convolution_flops

FREE = (*MOVES, *IDENTITIES, "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "iota")
FREE += ("convert_element_type", "copy", "rev", "expand_dims", "random_wrap", "random_unwrap")
# operations for matrices of n rows and n columns, times n³
CUBIC = {"cholesky": 1 / 3, "eigh": 9, "geqrf": 4 / 3, "householder_product": 4 / 3}


def count(function: Callable, *args: Any, dearest: bool = False) -> float:
    """The operations of `function(*args)`.

    Args:
        function: what is traced.
        *args: pytrees of arrays or of `jax.ShapeDtypeStruct`.
        dearest: whether of a conditional the dearest branch counts, rather than the cheapest.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args), dearest=dearest)


def count_jaxpr(jaxpr: ClosedJaxpr, *, dearest: bool = False) -> float:
    """The operations of a trace; see `count`."""
    return _of(jaxpr.jaxpr, max if dearest else min)


def _of(jaxpr: Jaxpr, pick: Callable) -> float:
    total, wanted = 0.0, {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        # what leads to no result the compiler leaves out
        if wanted.intersection(equation.outvars):
            wanted.update(x for x in equation.invars if not isinstance(x, Literal))
            total += _of_equation(equation, pick)
    return total


def _of_equation(equation: Any, pick: Callable) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        return pick(_of(branch.jaxpr, pick) for branch in params["branches"])
    inner = functions(equation)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        inner = inner[:1]
    if inner and not name.startswith(("reduce", "scatter", "arg", "sort")):
        times = params["length"] if name == "scan" else 1
        return times * sum(_of(opened(x), pick) for x in inner)
    if name in FREE or not equation.outvars:
        return 0
    out = equation.outvars[0].aval
    operand = equation.invars[0].aval if equation.invars else out
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * out.size * math.prod(operand.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name in CUBIC:
        rows, columns = operand.shape[-2:]
        return CUBIC[name] * operand.size * min(rows, columns)
    if name == "triangular_solve":
        return out.size * operand.shape[-1]
    # sums and the like look at every number that they are given
    return max(operand.size if name.startswith(("reduce", "cum", "arg")) else 0, out.size)
