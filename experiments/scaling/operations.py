"""Floating-point operations of a gradient and of an estimate's functions on large networks.

Three counts, all from shapes: of the trace, see `count`; by XLA of the lowered function; and by XLA
of the function compiled for some devices, where they are those of one device.  XLA counts the body
of a loop once, the dearest branch of a conditional, and nothing for factorisations, which are calls
of a library.  In a trace a `scan` counts as often as it is long, and factorisations by the usual
formulas; nothing is compiled or run.  A network of equal layers is counted with one and with two,
and the second layer's share is multiplied by the number of layers.
"""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

import fishleg_jax as flj
from experiments.scaling import placement, shapes
from fishleg_jax._devices import mesh as _mesh
from fishleg_jax._devices import placement as _placement
from fishleg_jax._jaxpr import functions, opened
from fishleg_jax.pruning.costs import IDENTITIES, MOVES, _convolution_flops

FREE = (*MOVES, *IDENTITIES, "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "iota")
FREE += ("convert_element_type", "copy", "rev", "expand_dims", "random_wrap", "random_unwrap")
# operations for matrices of n rows and n columns, times n³
CUBIC = {"cholesky": 1 / 3, "eigh": 9, "geqrf": 4 / 3, "householder_product": 4 / 3}


def count(function: Callable, *args: Any, dearest: bool = False) -> float:
    """The operations of `function(*args)`, from its trace.

    Args:
        function: the function to trace.
        *args: pytrees of arrays or of `jax.ShapeDtypeStruct`.
        dearest: whether the dearest branch of a conditional counts, rather than the cheapest.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args), dearest=dearest)


def count_jaxpr(jaxpr: ClosedJaxpr, *, dearest: bool = False) -> float:
    """The operations of a trace; see `count`."""
    return _of(jaxpr.jaxpr, max if dearest else min)


def _of(jaxpr: Jaxpr, pick: Callable) -> float:
    total, wanted = 0.0, {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        # the compiler leaves out whatever leads to no result
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


class Call(NamedTuple):
    """A function, the shapes of its arguments, and the placement of its result."""

    function: Callable
    arguments: tuple
    result: _placement.Placement


# of parameters and a batch
Calls = Callable[[Any, Any], dict[str, Call]]


def gradient_calls(model: flj.Model) -> Calls:
    """The gradient of the loss."""

    def gradient(params, batch):
        return jax.grad(lambda p: flj.loss(model, p, batch))(params)

    return lambda params, batch: {
        "gradient": Call(gradient, (params, batch), _placement.placement_like(params))
    }


def estimator_calls(estimator: flj.InverseFisher) -> Calls:
    """The functions of an estimate, with results that lie as in a fit and a pruning."""

    def calls(params, batch):
        state = jax.eval_shape(estimator.init, params)
        placement, like = _placement.placement_for(state, params), _placement.placement_like(params)
        state = placement.of_shapes(state)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return {
            "update": Call(estimator.update, (state, params, batch, key), placement),
            "multiply": Call(estimator.multiply, (state, params), like),
            "diagonal": Call(estimator.diagonal, (state, params), like),
        }

    return calls


def traced(calls: Calls, network: shapes.Network) -> dict[str, dict[str, float]]:
    """Operations from traces and by XLA of the whole, on one device.

    Args:
        calls: the functions to count.
        network: from whose shapes.

    Returns:
        For each function `trace`, `dearest` (of the trace, with conditionals at their dearest) and
        `lowered` (XLA's, of the lowered function).
    """

    def of(layers):
        found = {}
        for name, call in calls(network.params(layers), network.batch).items():
            trace = jax.jit(call.function).trace(*call.arguments)
            found[name, "trace"] = count_jaxpr(trace.jaxpr)
            found[name, "dearest"] = count_jaxpr(trace.jaxpr, dearest=True)
            found[name, "lowered"] = _flops(trace.lower())
        return found

    counted = _of_all_layers(of, network.layers)
    return {
        name: {kind: n for (other, kind), n in counted.items() if other == name}
        for name, _ in counted
    }


def compiled(
    calls: Calls, network: shapes.Network, devices: int, without: Collection[str] = ()
) -> dict[str, float]:
    """Operations on each of some devices, by XLA's count of the compiled functions.

    Args:
        calls: the functions to count.
        network: from whose shapes.
        devices: number of CPU devices, which JAX must have.
        without: names of functions that are not compiled.

    Returns:
        For each function its operations.
    """
    mesh = placement.mesh_of_cpu(devices)
    batch = placement.spread_batch(network.batch, mesh)

    def of(layers):
        params = placement.spread(network.params(layers), mesh)
        return _compiled(calls, params, batch, without)

    return _of_all_layers(of, network.layers)


@_mesh.in_mesh_of_params
def _compiled(calls: Calls, params: Any, batch: Any, without: Collection[str]) -> dict[str, float]:
    found = {}
    for name, (function, arguments, result) in calls(params, batch).items():
        if name not in without:
            run = functools.partial(_placement.placed, function, result)
            found[name] = _flops(jax.jit(run).lower(*arguments).compile())
    return found


def _flops(lowered_or_compiled: Any) -> float:
    # what has none has no entry
    return lowered_or_compiled.cost_analysis().get("flops", 0.0)


def _of_all_layers(of: Callable[[int], dict], layers: int) -> dict:
    """Operations of all layers, from those of one and two layers."""
    once = of(1)
    twice = of(2) if layers > 1 else once
    return {name: once[name] + (layers - 1) * (twice[name] - once[name]) for name in once}
