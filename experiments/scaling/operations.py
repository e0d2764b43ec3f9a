"""Floating-point operations of a gradient and of an estimate's functions on large networks.

Three counts, all from shapes: of the trace, see `experiments.scaling.traces`; by XLA of what it is
handed; and by XLA of what it compiled for some devices, where they are those of one device.  XLA
counts the body of a loop once, the dearest branch of a conditional, and for factorisations, which
are calls of a library, nothing.  A network of equal layers is counted with one and with two, and
what the second adds is taken times the number of layers.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

import fishleg_jax as flj
from experiments.scaling import placement, shapes, traces
from fishleg_jax import _mesh, _placement


class Call(NamedTuple):
    """A function, the shapes of what it is called with, and where its result is to lie."""

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
        calls: what is counted.
        network: from whose shapes.

    Returns:
        For each function `trace`, `dearest` (of the trace, with conditionals at their dearest) and
        `lowered` (XLA's, of what it is handed).
    """

    def of(layers):
        found = {}
        for name, call in calls(network.params(layers), network.batch).items():
            trace = jax.jit(call.function).trace(*call.arguments)
            found[name, "trace"] = traces.count_jaxpr(trace.jaxpr)
            found[name, "dearest"] = traces.count_jaxpr(trace.jaxpr, dearest=True)
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
    """Operations on each of some devices, by XLA of what it compiled for them.

    Args:
        calls: what is counted.
        network: from whose shapes.
        devices: of the CPU, as many of which JAX has to have.
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
    """What all layers take, from what one and two do."""
    once = of(1)
    twice = of(2) if layers > 1 else once
    return {name: once[name] + (layers - 1) * (twice[name] - once[name]) for name in once}
