"""Compiled functions that are found again, so that equal calls share their compilation."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a tracer: then nothing of it can be looked at on the host."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=64)
def jitted(
    function: Callable,
    *static: Hashable,
    donate: int | tuple = (),
    keep_unused: bool = False,
) -> Callable:
    """`function` with its first arguments held fixed, compiled: one and the same for equal calls.

    Args:
        function: what is compiled.
        *static: models, estimators and other things that are no arrays.
        donate: which of the other arguments are given up, so that results may take their memory.
        keep_unused: whether an argument counts for where it is computed though nothing reads it.
    """
    return jax.jit(
        functools.partial(function, *static), donate_argnums=donate, keep_unused=keep_unused
    )
