"""Structure of a pytree as JSON, and back: dictionaries, lists, tuples and None.

Every other container, such as a NamedTuple or a module of equinox, is described as a dictionary by
key path; `like=` of `load_params` restores it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from fishleg_jax import _tree


def describe(tree: Any) -> Any:
    """Returns the structure of a tree, with the names of its leaves in their places, for JSON."""
    return _describe(tree, iter([name for name, _ in _tree.named_leaves(tree)]))


def _describe(node: Any, names: Iterator[str]) -> Any:
    if node is None:
        return None
    if jax.tree_util.all_leaves([node]):
        return next(names)
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if type(node) in (list, tuple):
        return {type(node).__name__: [_describe(child, names) for _, child in children]}
    return {"dict": {_tree.leaf_name(path): _describe(child, names) for path, child in children}}


def restore(structure: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the tree that a structure describes.

    Args:
        structure: Description by `describe`.
        leaves: Leaves by name.

    Raises:
        KeyError: A leaf is missing.
    """
    if structure is None:
        return None
    if isinstance(structure, str):
        return leaves[structure]
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {key: restore(child, leaves) for key, child in children.items()}
    return {"list": list, "tuple": tuple}[kind](restore(child, leaves) for child in children)
