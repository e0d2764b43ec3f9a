"""Selection of leaves: by default, by expressions, by a predicate, or by booleans.

The decision is made once, from the weights, and passed on: a predicate that reads values would
answer differently for scores, gradients or tracers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers

LeafSelection = str | Sequence[str] | Callable[[str, Any], Any] | Mapping[str, bool] | Any | None

EXPECTED = (
    "regular expressions over key paths, a mapping from them to True or False, a pytree of "
    "booleans like the parameters, a predicate (name, leaf) or None"
)
NORMALISATION = re.compile(
    r"norm(s|ali[sz]ation)?(_?\d+)?(_(final|in|out|pre|post|f|x|y))?$"
    r"|^(ln|bn|gn)(_?(\d+|f|final|in|out|pre|post|x|y))*$",
    re.IGNORECASE,
)
SCALES = {"scale", "scales", "gamma", "beta", "offset", "shift"}
BIASES = re.compile(r"^(bias|biases|.*_bias|bias_.*)$", re.IGNORECASE)
# names that matrices may have as well: biases only beside a kernel with the same outputs
SHORT_BIASES = re.compile(r"^(b\d*|b_.*|.*_b\d*)$", re.IGNORECASE)
POSITIONS = re.compile(
    r"^(.*_)?(embed|embeds|embedding|embeddings|embedder|emb|wte|wpe|pos|position|positions"
    r"|positional)(_?\d+)?(_.*)?$",
    re.IGNORECASE,
)
MATRICES = {"kernel"}  # never a table or a scale, whatever the name of its layer


def select(
    tree: Any, selection: LeafSelection, argument: str, stacked: Sequence[bool] | None = None
) -> list[bool]:
    """Returns whether each leaf of a tree is selected.

    Args:
        tree: The weights, any pytree of arrays.
        selection: A predicate `(name, leaf) -> bool`; regular expressions, any of which may match
            anywhere in the name; a mapping of regular expressions to booleans, the first match
            deciding (leaves without a match are excluded, or follow the default if every value is
            False); a pytree of booleans like the tree, or a prefix of it; or None for the default,
            see `reasons`.
        argument: Name of the argument, for error messages.
        stacked: Whether each leaf has a leading axis of layers; None if none has.

    Returns:
        A bool for every leaf, in the tree's order.

    Raises:
        ValueError: A selection of another type, an invalid expression or one that matches no leaf,
            a predicate that reads traced values, or an empty selection.
    """
    return [reason is None for reason in reasons(tree, selection, argument, stacked)]


def reasons(
    tree: Any, selection: LeafSelection, argument: str, stacked: Sequence[bool] | None = None
) -> list[str | None]:
    """Returns the reason why each leaf is excluded; None for a selected leaf.

    By default a leaf is excluded if it has at most one dimension larger than 1 (without the leading
    axis of a stacked leaf), or the name of a bias, a normalisation's parameter, an embedding or a
    position.  Arguments and errors as in `select`.
    """
    # one branch per type of selection, each with a hint for the error if it selects no leaf
    leaves = _tree.named_leaves(tree)
    if getattr(selection, "_fields", ())[:1] == (
        "prunable",
    ):  # a pruning would have taken it apart
        raise ValueError(
            f"{argument} must be {EXPECTED}, got flj.Leaves, which only prunings take: pass its "
            f"field, {argument}=leaves.prunable"
        )
    if selection is None:
        found = default_reasons(leaves, stacked)
        hint = "vectors, biases, normalisations and embeddings are left out unless they are named"
        if stacked is not None and any(stacked):
            hint += ", and stacked leaves are judged without their leading axis of layers"
    elif (booleans := _as_booleans(tree, selection, argument)) is not None:
        found = [None if yes else f"not in {argument}" for yes in booleans]
        hint = "every boolean is False"
    elif callable(selection):
        numbers.check_function(selection, argument, 2, "a predicate (name, leaf)")
        found = [
            None if _answer(selection, name, leaf, argument) else "the predicate is False"
            for name, leaf in leaves
        ]
        hint = "the predicate was False for all of them"
    elif isinstance(selection, Mapping):
        found = _by_mapping(leaves, selection, argument, stacked)
        hint = "no expression with True matches"
    else:
        patterns = [selection] if isinstance(selection, str) else selection
        if not _texts(patterns):
            raise ValueError(f"{argument} must be {EXPECTED}, got {_text.shown(selection)}")
        columns = [_tree.matches(pattern, leaves, argument) for pattern in patterns]
        rows = zip(*columns, strict=True) if columns else [()] * len(leaves)
        found = [None if any(row) else f"not in {argument}" for row in rows]
        hint = "no expression was given"
    if all(reason is not None for reason in found):
        names = ", ".join(name or "(the whole tree)" for name, _ in leaves) or "none"
        raise ValueError(f"{argument} selects no leaf: {hint}; the leaves are: {names}")
    return found


def check_type(selection: Any, argument: str) -> None:
    """Raises a ValueError for a selection of a type that `select` does not take."""
    fits = (
        selection is None
        or callable(selection)
        or isinstance(selection, str)
        or (isinstance(selection, (list, tuple)) and _texts(selection))
        or _all_booleans(selection)
    )
    if not fits:
        raise ValueError(f"{argument} must be {EXPECTED}, got {_text.shown(selection)}")


def _texts(patterns: Any) -> bool:
    return isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)


def _is_boolean(value: Any) -> bool:
    scalar = isinstance(value, (np.ndarray, jax.Array)) and np.ndim(value) == 0
    return isinstance(value, (bool, np.bool_)) or (scalar and value.dtype == bool)


def _all_booleans(selection: Any) -> bool:
    leaves = jax.tree.leaves(selection)
    return bool(leaves) and all(map(_is_boolean, leaves))


def _as_booleans(tree: Any, selection: Any, argument: str) -> list[bool] | None:
    """Booleans of a pytree with the parameters' structure or a prefix of it; else None."""
    if not _all_booleans(selection):
        return None
    if _is_boolean(selection) and jax.tree.structure(tree).num_leaves != 1:
        raise ValueError(
            f"{argument} must choose among the leaves, got a single {selection}: use {EXPECTED}"
        )
    try:
        whole = jax.tree.broadcast(selection, tree)
    except (ValueError, TypeError):
        return None
    return [bool(x) for x in jax.tree.leaves(whole)]


def _answer(predicate: Callable, name: str, leaf: Any, argument: str) -> bool:
    try:
        answer = predicate(name, leaf)
        if not _is_boolean(answer):
            raise ValueError(
                f"{argument} must return True or False, got {_text.shown(answer)} for {name!r}"
            )
        return bool(answer)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"{argument} reads the values of {name!r}, which are unknown under jit: decide outside "
            "of jit and pass booleans, one for each leaf"
        ) from error


def _by_mapping(
    leaves: list[tuple[str, Any]],
    selection: Mapping[str, bool],
    argument: str,
    stacked: Sequence[bool] | None,
) -> list[str | None]:
    for pattern, value in selection.items():
        if not isinstance(pattern, str) or not _is_boolean(value):
            raise ValueError(
                f"{argument}: a mapping must map regular expressions to True or False, got "
                f"{_text.shown(pattern)}: {_text.shown(value)}"
            )
    found = {pattern: _tree.matches(pattern, leaves, argument) for pattern in selection}
    inherit = not any(map(bool, selection.values()))
    rest = default_reasons(leaves, stacked) if inherit else [f"not in {argument}"] * len(leaves)

    def decided(i: int) -> str | None:
        hit = next((pattern for pattern in selection if found[pattern][i]), None)
        if hit is None:
            return rest[i]
        return None if selection[hit] else f"{argument} has {hit!r}: False"

    return [decided(i) for i in range(len(leaves))]


def default_reasons(
    leaves: list[tuple[str, Any]], stacked: Sequence[bool] | None
) -> list[str | None]:
    """Returns the reason why the default excludes each named leaf, see `reasons`."""
    # shapes of single layers, and those of each leaf's siblings
    shapes = [
        tuple(jnp.shape(leaf))[1 if stacked is not None and stacked[i] else 0 :]
        for i, (_, leaf) in enumerate(leaves)
    ]
    siblings: dict[str, list[tuple[int, ...]]] = {}
    for (name, _), shape in zip(leaves, shapes, strict=True):
        siblings.setdefault(name.rpartition("/")[0], []).append(shape)

    def reason(name: str, shape: tuple[int, ...]) -> str | None:
        # by name first: normalisations, biases, embeddings; then by shape
        parent, _, own = name.rpartition("/")
        parts = [part for part in parent.split("/") if part]
        normalises = own not in MATRICES and any(map(NORMALISATION.search, parts))
        if normalises or own.lower() in SCALES or NORMALISATION.search(own):
            return "normalisation"
        short = SHORT_BIASES.match(own) and _beside_a_kernel(shape, siblings[parent])
        if BIASES.match(own) or short:
            return "bias"
        tables = [part for part in (*parts, own) if "patch" not in part.lower()]
        if own not in MATRICES and any(map(POSITIONS.match, tables)):
            return "embedding or position"
        if sum(n > 1 for n in shape) < 2:
            return "vector"
        return None

    return [reason(name, shape) for (name, _), shape in zip(leaves, shapes, strict=True)]


def _beside_a_kernel(shape: tuple[int, ...], others: list[tuple[int, ...]]) -> bool:
    """Whether a shape is that of a bias: one dimension less than a sibling with its outputs."""
    return any(len(o) == len(shape) + 1 and o[-1:] == shape[-1:] for o in others)
