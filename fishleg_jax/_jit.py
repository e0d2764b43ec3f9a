"""Cache of compiled functions, so that equal calls share a compilation."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a tracer, whose values the host cannot read."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=64)
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
