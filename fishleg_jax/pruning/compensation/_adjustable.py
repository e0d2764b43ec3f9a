"""Which leaves a compensation may move: all of them, or those that a user names."""

import inspect
from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax import _prunable
from fishleg_jax.pruning.compensation._independent import may_move
from fishleg_jax.pruning.masks.groups import Groups

Adjustable = tuple[bool, ...] | None  # for every leaf whether it may move; None for all of them


def decide(params: Any, adjustable: _prunable.LeafSelection) -> Adjustable:
    """Which leaves may move, decided from the weights.

    Args:
        params: The weights.
        adjustable: As `prunable`, see `_prunable.select`; None for all leaves.
    """
    if adjustable is None:
        return None
    return tuple(_prunable.select(params, adjustable, "adjustable"))


def check_compensation(compensation: Any, adjustable: Any) -> None:
    """Raises a ValueError where a compensation can't be told which leaves it may move."""
    if adjustable is None:
        return
    try:
        parameters = inspect.signature(compensation).parameters.values()
    except ValueError:  # a function written in C may have no signature
        return
    if not any(p.name == "adjustable" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            "adjustable needs a compensation that takes a keyword of this name, as those of "
            f"flj.compensation do, got {_prunable.shortened(compensation)}"
        )


def compensated(
    compensation: Callable[..., tuple[Any, dict]], adjustable: Adjustable, *arguments: Any
) -> tuple[Any, dict]:
    """The change that a compensation makes, of adjustable leaves only.

    Args:
        compensation: One of `flj.compensation`, or a function like these.
        adjustable: For every leaf whether it may move; None for all of them.
        *arguments: Weights, masks of before and after, curvature, estimator and its state.
    """
    if adjustable is None:
        return compensation(*arguments)
    tree = jax.tree.structure(arguments[0])
    return compensation(*arguments, adjustable=tree.unflatten(adjustable))


def movable(masks: Any, adjustable: Adjustable, groups: Groups) -> Any:
    """Masks of the weights that an estimate is made of: the kept ones that may move or be pruned.

    Of leaves that do neither the Fisher is of no interest: they stay as they are, and what others
    do must not count on them.
    """
    if adjustable is None:
        return masks
    pairs = zip(adjustable, groups.chosen, strict=True)
    wanted = jax.tree.structure(masks).unflatten(moves or pruned for moves, pruned in pairs)
    return may_move(masks, wanted)
