"""Axes of a network's leaves that its products of matrices and convolutions sum over."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from fishleg_jax import _jaxpr

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr

Origin = tuple[int, tuple[int | None, ...]] | None  # a leaf, and its axis in every dimension
CALLS = (*_jaxpr.CALLS, "closed_call", "custom_jvp_call", "custom_vjp_call")
SAME = ("convert_element_type", "copy", "mul", "div", "add", "sub", "neg", "select_n")


def summed_axes(function: Callable[..., Any], tree: Any, *arguments: Any) -> list[list[set[int]]]:
    """Finds the axes of every leaf that products sum over.

    Leaves are followed through transpositions, casts, elementwise operations, compiled functions
    and loops over layers, and lost where they are reshaped otherwise.

    Args:
        function: Function `(tree, *arguments)`; it is traced, not run.
        tree: Pytree of arrays.
        *arguments: Its other arguments.

    Returns:
        For every leaf a set of axes for each product that it takes part in.
    """
    traced = jax.make_jaxpr(function)(tree, *arguments)
    leaves = jax.tree.leaves(tree)
    origins: list[Origin] = [(i, tuple(range(x.ndim))) for i, x in enumerate(leaves)]
    found: list[list[set[int]]] = [[] for _ in leaves]
    rest = len(traced.jaxpr.invars) - len(leaves)
    _follow(traced, [*origins, *[None] * rest], found)
    return found


def _follow(
    function: "Jaxpr | ClosedJaxpr", operands: Sequence[Origin], found: list[list[set[int]]]
) -> list[Origin]:
    """Follows leaves through a traced function; returns the origins of its results."""
    jaxpr = _jaxpr.opened(function)
    known = dict(zip(jaxpr.invars, operands, strict=True))
    read = lambda atom: None if isinstance(atom, _jaxpr.core().Literal) else known.get(atom)
    for equation in jaxpr.eqns:
        own = [read(x) for x in equation.invars]
        if any(own):
            for variable, origin in zip(
                equation.outvars, _step(equation, own, found), strict=False
            ):
                known[variable] = origin
    return [read(x) for x in jaxpr.outvars]


def _step(equation: Any, own: list[Origin], found: list[list[set[int]]]) -> list[Origin]:
    """Follows leaves through one operation; returns the origins of the first results."""
    name, params = equation.primitive.name, equation.params
    shapes = [tuple(x.aval.shape) for x in equation.invars]
    result = tuple(equation.outvars[0].aval.shape)
    if name == "dot_general":
        for origin, summed in zip(own, params["dimension_numbers"][0], strict=True):
            _record(origin, summed, found)
    elif name == "conv_general_dilated":
        _, inputs, *spatial = params["dimension_numbers"].rhs_spec
        _record(own[1], (inputs, *spatial), found)
    elif name in CALLS:
        inner = _jaxpr.functions(equation)
        if name != "cond":
            return _follow(inner[0], own, found)
        for branch in inner:  # the first operand is their index
            _follow(branch, own[1:], found)
    elif name == "scan":
        constant, carry = params["num_consts"], params["num_carry"]
        layers = [None if x is None else (x[0], x[1][1:]) for x in own[constant + carry :]]
        _follow(params["jaxpr"], [*own[:constant], *[None] * carry, *layers], found)
    elif name == "transpose":
        leaf, axes = own[0]
        return [(leaf, tuple(axes[i] for i in params["permutation"]))]
    elif name == "broadcast_in_dim":
        leaf, axes = own[0]
        places = dict(zip(params["broadcast_dimensions"], axes, strict=True))
        return [(leaf, tuple(places.get(i) for i in range(len(result))))]
    elif name in ("reshape", "squeeze") and _longer(shapes[0]) == _longer(result):
        leaf, axes = own[0]  # axes of length one come or go
        kept = iter(axis for axis, n in zip(axes, shapes[0], strict=True) if n != 1)
        return [(leaf, tuple(None if n == 1 else next(kept) for n in result))]
    elif name in SAME:
        return [next((x for x, s in zip(own, shapes, strict=True) if x and s == result), None)]
    return []


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


def _record(origin: Origin, dimensions: Sequence[int], found: list[list[set[int]]]) -> None:
    if origin is not None:
        leaf, axes = origin
        found[leaf].append({axes[i] for i in dimensions if axes[i] is not None})
