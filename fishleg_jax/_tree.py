"""Leaves by key path, the one way in which this library tells the leaves of a pytree apart."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

EXACT = 2**24  # up to which float32 has all whole numbers
Stacked = str | Sequence[str] | Callable[[str, jax.ShapeDtypeStruct], bool] | None


def leaf_name(path: tuple) -> str:
    """A key path as text, such as `Dense_0/kernel`; the `/value` of an NNX variable is left out."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their names, in the tree's order."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def matches(pattern: str, leaves: list[tuple[str, Any]], argument: str) -> list[bool]:
    """Which of the named leaves a regular expression is found in; at least one, or a ValueError."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression: {error}") from None
    found = [expression.search(name) is not None for name, _ in leaves]
    if not any(found):
        names = ", ".join(name for name, _ in leaves)
        raise ValueError(f"{argument}: {pattern!r} matches no leaf; the leaves are: {names}")
    return found


def wide_dtype(dtype: Any) -> jnp.dtype:
    """The dtype for factors and solves: that of the parameters, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(tree: Any) -> Any:
    """Every leaf in float32 or better."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(jnp.asarray(x).dtype)), tree)


def dot(x: Any, y: Any) -> jax.Array:
    """The inner product of two pytrees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)))


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite: a boolean scalar, jit-compatible."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def count(marked: jax.Array) -> jax.Array:
    """How many entries of a boolean array are true, int32; fewer than 2³¹.

    Added up in float32 where that is exact, of up to 2²⁴ at a time: for whole numbers XLA for the
    CPU takes twice as long.
    """
    if marked.size <= EXACT:
        return jnp.sum(marked, dtype=jnp.float32).astype(jnp.int32)
    if marked.shape[-1] > EXACT:
        return jnp.sum(marked, dtype=jnp.int32)
    return jnp.sum(jnp.sum(marked, axis=-1, dtype=jnp.float32).astype(jnp.int32))


def keep_where(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where a boolean scalar is true, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def check_same(params: Any, other: Any, argument: str) -> None:
    """Raises a ValueError where two pytrees differ in structure or in the shape of a leaf."""
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
    """Where two pytrees of different structure differ, in words: the first key paths that do."""
    one, two = (  # in order, and quick to look up
        dict.fromkeys(name or "(the whole tree)" for name, _ in named_leaves(x))
        for x in (params, other)
    )
    lacks = [name for name in one if name not in two]
    more = [name for name in two if name not in one]
    parts = [f"lacks {_first(lacks)}"] if lacks else []
    parts += [f"has {_first(more)} besides"] if more else []
    if not parts:
        parts = [f"is made of other containers, a {type(other).__name__} at its top"]
    return " and ".join(parts)


def _first(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_names(leaves: list[tuple[str, Any]]) -> None:
    """Raises a ValueError where two leaves have one name, as `{"a/b": x, "a": {"b": y}}` would."""
    seen = set()
    for name, _ in leaves:
        if name in seen:
            raise ValueError(f"params: two leaves have the key path {name!r}; rename one of them")
        seen.add(name)


def stacked_leaves(tree: Any, stacked: Stacked, argument: str) -> list[bool]:
    """Which leaves have a leading axis of layers, as those of a `lax.scan` over layers have.

    Args:
        tree: Any pytree of arrays.
        stacked: Regular expressions over key paths, a predicate `(name, shape) -> bool` of a
            name and a `jax.ShapeDtypeStruct`, or None for none of the leaves.
        argument: Name of the argument, for error messages.

    Returns:
        A bool for every leaf, in the tree's order.

    Raises:
        ValueError: an expression that matches no leaf, a leaf of fewer than two dimensions.
    """
    leaves = named_leaves(tree)
    if stacked is None:
        return [False] * len(leaves)
    if callable(stacked):
        # asked of tangents and tracers, too: shapes are what all of these have in common
        shape_of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
        try:
            found = [bool(stacked(name, shape_of(leaf))) for name, leaf in leaves]
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"{argument} must be a predicate of a name and a jax.ShapeDtypeStruct, which has "
                f"no values to look at: {error}"
            ) from error
    else:
        patterns = [stacked] if isinstance(stacked, str) else stacked
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise ValueError(
                f"{argument} must be a regular expression, several of them, a predicate "
                f"(name, leaf) or None, got {stacked!r}"
            )
        columns = [matches(pattern, leaves, argument) for pattern in patterns]
        found = [any(column[i] for column in columns) for i in range(len(leaves))]
    for (name, leaf), yes in zip(leaves, found, strict=True):
        if yes and jnp.ndim(leaf) < 2:
            raise ValueError(
                f"{argument}: {name!r} must have two or more dimensions, the first of layers, got "
                f"shape {jnp.shape(leaf)}"
            )
    return found


def apply_mask(tree: Any, mask: Any | None) -> Any:
    """A pytree with the entries outside a boolean mask set to zero; unchanged where it is None."""
    if mask is None:
        return tree
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask)
