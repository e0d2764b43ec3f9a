"""Pytree utilities; leaves are identified by key path throughout the library."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _text

EXACT = 2**24  # float32 represents all whole numbers up to this one
Stacked = str | Sequence[str] | Callable[[str, jax.ShapeDtypeStruct], bool] | None


def leaf_name(path: tuple) -> str:
    """Key path as text, such as `Dense_0/kernel`, without the `/value` of an NNX variable."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of a tree with their names, in tree order."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def matches(pattern: str, leaves: list[tuple[str, Any]], argument: str) -> list[bool]:
    """Whether a regular expression matches each named leaf; raises a ValueError without a match."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None
    found = [expression.search(name) is not None for name, _ in leaves]
    if not any(found):
        names = ", ".join(name for name, _ in leaves)
        raise ValueError(f"{argument}: {pattern!r} matches no leaf; the leaves are: {names}")
    return found


def wide_dtype(dtype: Any) -> jnp.dtype:
    """Dtype for factors and solves: that of the parameters, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(tree: Any) -> Any:
    """Casts every leaf to float32 or better."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(jnp.asarray(x).dtype)), tree)


def dot(x: Any, y: Any) -> jax.Array:
    """Inner product of two pytrees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)))


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of a pytree are finite: a boolean scalar, jit-compatible."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def count(marked: jax.Array) -> jax.Array:
    """Number of true entries of a boolean array, int32, below 2³¹.

    Summed in float32 while that is exact, up to 2²⁴ entries at a time: integer sums take XLA for
    the CPU twice as long.
    """
    if marked.size <= EXACT:
        return jnp.sum(marked, dtype=jnp.float32).astype(jnp.int32)
    if marked.shape[-1] > EXACT:
        return jnp.sum(marked, dtype=jnp.int32)
    return jnp.sum(jnp.sum(marked, axis=-1, dtype=jnp.float32).astype(jnp.int32))


def check_same(params: Any, other: Any, argument: str) -> None:
    """Raises a ValueError if two pytrees differ in structure or in the shape of a leaf."""
    if jax.tree.structure(params) != jax.tree.structure(other):
        raise ValueError(
            f"{argument} must have the structure of the parameters, but {difference(params, other)}"
        )
    for (name, x), y in zip(named_leaves(params), jax.tree.leaves(other), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"{argument}: {name!r} must have shape {jnp.shape(x)}, got {jnp.shape(y)}"
            )


def difference(params: Any, other: Any) -> str:
    """Describes how the structures of two pytrees differ, by the first differing key paths."""
    one, two = (  # dicts: ordered, with fast lookup
        dict.fromkeys(name or "(the whole tree)" for name, _ in named_leaves(x))
        for x in (params, other)
    )
    lacks = [name for name in one if name not in two]
    more = [name for name in two if name not in one]
    parts = [f"lacks {_first(lacks)}"] if lacks else []
    parts += [f"has {_first(more)} in addition"] if more else []
    if not parts:
        parts = [f"is built from other containers, with a {type(other).__name__} at the top"]
    return " and ".join(parts)


def _first(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_names(leaves: list[tuple[str, Any]]) -> None:
    """Raises a ValueError if two leaves share a name, as in `{"a/b": x, "a": {"b": y}}`."""
    seen = set()
    for name, _ in leaves:
        if name in seen:
            raise ValueError(f"params: two leaves have the key path {name!r}; rename one of them")
        seen.add(name)


def stacked_leaves(tree: Any, stacked: Stacked, argument: str) -> list[bool]:
    """Returns whether each leaf has a leading axis of layers, as for a `lax.scan` over layers.

    Args:
        tree: Any pytree of arrays.
        stacked: Regular expressions over key paths; a predicate `(name, shape) -> bool` of a name
            and a `jax.ShapeDtypeStruct`; or None if no leaf is stacked.
        argument: Name of the argument, for error messages.

    Returns:
        A bool for every leaf, in the tree's order.

    Raises:
        ValueError: An expression that matches no leaf, or a leaf of fewer than two dimensions.
    """
    leaves = named_leaves(tree)
    if stacked is None:
        return [False] * len(leaves)
    if callable(stacked):
        # called for tangents and tracers as well, which share only shapes and dtypes
        shape_of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
        try:
            found = [bool(stacked(name, shape_of(leaf))) for name, leaf in leaves]
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{argument} must be a predicate of a name and a jax.ShapeDtypeStruct, which has "
                f"no values: {error}"
            ) from error
    else:
        patterns = [stacked] if isinstance(stacked, str) else stacked
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise ValueError(
                f"{argument} must be one or several regular expressions, a predicate "
                f"(name, leaf) or None, got {_text.shown(stacked)}"
            )
        # a leaf is stacked if any expression matches its name
        columns = [matches(pattern, leaves, argument) for pattern in patterns]
        found = [any(column[i] for column in columns) for i in range(len(leaves))]
    for (name, leaf), yes in zip(leaves, found, strict=True):
        if yes and jnp.ndim(leaf) < 2:
            raise ValueError(
                f"{argument}: {name!r} must have at least two dimensions, the first over layers, "
                f"got shape {jnp.shape(leaf)}"
            )
    return found


def apply_mask(tree: Any, mask: Any | None) -> Any:
    """Sets the entries of a pytree outside a boolean mask to zero; None changes nothing."""
    if mask is None:
        return tree
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask)
