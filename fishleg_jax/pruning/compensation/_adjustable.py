"""Leaves that a compensation may move: all of them, or those that a user names."""

from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax import _prunable, _text
from fishleg_jax._checks import numbers
from fishleg_jax.pruning.compensation._independent import may_move
from fishleg_jax.pruning.masks.groups import Groups

Adjustable = tuple[bool, ...] | None  # whether each leaf may move; None for all


def decide(params: Any, adjustable: _prunable.LeafSelection) -> Adjustable:
    """Decides from the weights which leaves may move.

    Args:
        params: Weights.
        adjustable: Leaves to move, given like `prunable` (see `_prunable.select`); None for all.
    """
    if adjustable is None:
        return None
    return tuple(_prunable.select(params, adjustable, "adjustable"))


def check_compensation(compensation: Any, adjustable: Any) -> None:
    """Raises a ValueError if a compensation lacks the keyword `adjustable` that it needs."""
    if adjustable is None:
        return
    if not numbers.takes_keyword(compensation, "adjustable"):
        raise ValueError(
            "adjustable needs a compensation with a keyword of that name, such as those in "
            f"flj.compensation, got {_text.shown(compensation)}"
        )


def compensated(
    compensation: Callable[..., tuple[Any, dict]], adjustable: Adjustable, *arguments: Any
) -> tuple[Any, dict]:
    """Change of the weights that a compensation makes, restricted to adjustable leaves.

    Args:
        compensation: One of `flj.compensation`, or a function with the same signature.
        adjustable: Whether each leaf may move; None for all.
        *arguments: Weights, masks before and after, curvature, estimator and its state.
    """
    if adjustable is None:
        return compensation(*arguments)
    tree = jax.tree.structure(arguments[0])
    return compensation(*arguments, adjustable=tree.unflatten(adjustable))


def movable(masks: Any, adjustable: Adjustable, groups: Groups) -> Any:
    """Masks of the weights that an estimate covers: the kept ones that may move or be pruned.

    Leaves that do neither need no Fisher: they stay as they are, and corrections of other weights
    must not rely on them.
    """
    if adjustable is None:
        return masks
    pairs = zip(adjustable, groups.chosen, strict=True)
    wanted = jax.tree.structure(masks).unflatten(moves or pruned for moves, pruned in pairs)
    return may_move(masks, wanted)
