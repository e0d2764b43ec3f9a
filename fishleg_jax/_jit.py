"""Caches of compiled functions and of result shapes, so that equal calls share a trace."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a tracer, whose values the host cannot read."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=256)
def jitted(
    function: Callable,
    *static: Hashable,
    donate: int | tuple = (),
    keep_unused: bool = False,
) -> Callable:
    """Compiles `function` with its first arguments fixed; returns the same object for equal calls.

    Args:
        function: Function to compile.
        *static: Leading arguments other than arrays, such as models and estimators.
        donate: Positions of the other arguments to donate, whose memory results may reuse.
        keep_unused: Whether unused arguments still determine on which devices to compute.
    """
    return jax.jit(
        functools.partial(function, *static), donate_argnums=donate, keep_unused=keep_unused
    )


def signature(tree: Any) -> Hashable:
    """Structure of a pytree with shapes, dtypes and shardings: all that a trace depends on."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in leaves]
    return structure, tuple(shapes)


_SHAPES: dict[Hashable, Any] = {}  # result shapes by function and signature, oldest first


def shapes_of(compiled: Callable, *arguments: Any) -> Any:
    """Shapes and dtypes of a result of `jitted`, remembered; `eval_shape` takes a millisecond."""
    if is_traced(arguments):
        return compiled.eval_shape(*arguments)
    set_by_user = jax.sharding.get_abstract_mesh(), jax.config.jax_enable_x64
    key = compiled, signature(arguments), set_by_user
    if key not in _SHAPES:
        _SHAPES[key] = compiled.eval_shape(*arguments)
        if len(_SHAPES) > 256:
            _SHAPES.pop(next(iter(_SHAPES)))
    return _SHAPES[key]
