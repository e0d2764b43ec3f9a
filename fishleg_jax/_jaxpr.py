"""Inspecting and rewriting traced functions."""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr


@functools.cache
def core() -> ModuleType:
    """Returns `jax.extend.core`, imported on first use: it loads Pallas, a tenth of JAX's time."""
    import jax.extend.core

    return jax.extend.core


def is_function(x: Any) -> bool:
    """Whether a parameter of an equation is a traced function."""
    return isinstance(x, (core().Jaxpr, core().ClosedJaxpr))


def opened(function: "Jaxpr | ClosedJaxpr") -> "Jaxpr":
    """Returns a traced function without its constants."""
    return getattr(function, "jaxpr", function)


def functions(equation: Any) -> "list[Jaxpr | ClosedJaxpr]":
    """All traced functions among an equation's parameters, alone or in a tuple."""
    values = [x if isinstance(x, tuple) else (x,) for x in equation.params.values()]
    return [x for group in values for x in group if is_function(x)]


def has(function: "Jaxpr | ClosedJaxpr", name: str) -> bool:
    """Whether a traced function, or one that it calls, contains an operation of this name."""
    return any(
        equation.primitive.name == name or any(has(inner, name) for inner in functions(equation))
        for equation in opened(function).eqns
    )


# Operations whose inner functions are searched for replacements.  All others, such as
# `custom_jvp_call` and `shard_map`, are kept unchanged.
CALLS = ("jit", "pjit", "checkpoint", "remat2", "cond")
LOOPS = ("scan", "while")
INLINED = ("jit", "pjit", "checkpoint", "remat2")  # on request
# calls with a rule of differentiation of their own
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
Replacement = Callable[[Any, bool], Callable[..., Any] | None]


def with_replaced(
    function: Callable, replacement: Replacement, *, inline: bool = False
) -> Callable:
    """Returns the same function with some operations replaced.

    Args:
        function: Function of pytrees of arrays, called directly if nothing is replaced.
        replacement: Function `(equation, in_loop)` that returns a function from the operands to the
            only result of the operation, or None to keep it.
        inline: Whether to dissolve inner `jit` and `checkpoint`, so that a replacement sees the
            arrays that the function was called with there, too; False by default.
    """

    def run(*args):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if not _replaces(closed.jaxpr, replacement, False):
            return function(*args)
        leaves = jax.tree.leaves(args)
        leaves = _evaluate(closed.jaxpr, closed.consts, leaves, replacement, False, inline)
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return run


def _replaces(jaxpr: "Jaxpr", replacement: Replacement, in_loop: bool) -> bool:
    """Whether any operation of a traced function would be replaced."""
    return any(
        replacement(equation, in_loop) is not None or _is_entered(equation, replacement, in_loop)
        for equation in jaxpr.eqns
    )


def _is_entered(equation: Any, replacement: Replacement, in_loop: bool) -> bool:
    """Whether an operation has inner functions with something to replace."""
    name = equation.primitive.name
    # a type that varies over mesh axes could not be restored for the inner function
    varies = any(getattr(x.aval, "vma", ()) for x in equation.invars)
    if name not in (*CALLS, *LOOPS) or varies:
        return False
    inside = in_loop or name in LOOPS
    return any(_replaces(opened(inner), replacement, inside) for inner in functions(equation))


def _evaluate(
    jaxpr: "Jaxpr",
    consts: Sequence[Any],
    args: Sequence[Any],
    replacement: Replacement,
    in_loop: bool,
    inline: bool = False,
) -> list[Any]:
    """Evaluates a traced function with replacements and returns its results."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, core().Literal) else known[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        replaced = replacement(equation, in_loop)
        dissolved = inline and equation.primitive.name in INLINED
        if replaced is not None:
            results = [replaced(*operands)]
        elif dissolved and _is_entered(equation, replacement, in_loop):
            (inner,) = functions(equation)
            own = opened(inner), getattr(inner, "consts", ())
            results = _evaluate(*own, operands, replacement, in_loop, inline)
        else:
            kept = _with_inner_replaced(equation, replacement, in_loop)
            results = apply(kept, jaxpr, read)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def apply(equation: Any, jaxpr: "Jaxpr", read: Callable[[Any], Any]) -> list[Any]:
    """Returns the results of one equation of a traced function, whose operands `read` returns."""
    # wrap the operation in a function: how to call it directly differs between JAX versions
    inputs = [x for x in equation.invars if not isinstance(x, core().Literal)]
    inputs = list(dict.fromkeys(inputs))
    one = jaxpr.replace(constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation])
    return core().jaxpr_as_fun(core().ClosedJaxpr(one, []))(*map(read, inputs))


def _with_inner_replaced(equation: Any, replacement: Replacement, in_loop: bool) -> Any:
    """Returns an operation with replacements in its inner functions."""
    if not _is_entered(equation, replacement, in_loop):
        return equation
    inside = in_loop or equation.primitive.name in LOOPS

    def inner(x):
        if isinstance(x, tuple):
            return tuple(map(inner, x)) if any(map(is_function, x)) else x
        return _rewritten(x, replacement, inside) if is_function(x) else x

    return equation.replace(params={name: inner(x) for name, x in equation.params.items()})


@functools.lru_cache(maxsize=256)  # so that equal calls outside of `jit` share a compilation
def _rewritten(function: Any, replacement: Replacement, in_loop: bool) -> Any:
    """Returns a traced function with operations replaced, of the same type."""
    jaxpr, consts = opened(function), getattr(function, "consts", ())
    shapes = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, weak_type=x.aval.weak_type)
        for x in jaxpr.invars
    ]
    run = lambda *args: _evaluate(jaxpr, consts, args, replacement, in_loop)  # noqa: E731
    closed = jax.make_jaxpr(run)(*shapes)
    return closed if isinstance(function, core().ClosedJaxpr) else closed.jaxpr
