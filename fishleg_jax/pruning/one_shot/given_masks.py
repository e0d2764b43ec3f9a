"""Masks that were chosen elsewhere, as the end of a one-shot pruning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _prunable, _text, _tree
from fishleg_jax.pruning.leaves import Leaves
from fishleg_jax.pruning.masks import groups as _groups
from fishleg_jax.pruning.one_shot.budget import sparsity_of
from fishleg_jax.pruning.target_types import Given


class Settled(NamedTuple):
    """Arguments of a pruning that ends at given masks.

    Attributes:
        wanted: Masks to end at.
        leaves: Leaves that are pruned: those by default, and those in which the masks prune.
        sparsity: Fraction of their weights that the masks prune.
        masks: Masks to start from.
    """

    wanted: Any
    leaves: Leaves
    sparsity: float
    masks: Any


def settle(target: Given, params: Any, leaves: Leaves, masks: Any, **others: Any) -> Settled:
    """Turns given masks into leaves, a sparsity and masks to start from.

    Args:
        target: The masks.
        params: Weights.
        leaves: Leaves that the user named.
        masks: Argument of `prune_one_shot`: masks to start from, `"zeros"` or None.
        **others: Arguments that have no part in it, and their defaults: pairs by name.

    Raises:
        ValueError: Masks of another structure, shape or dtype, that prune nothing or everything, or
            together with arguments that choose weights.
    """
    others["prunable"] = leaves.prunable, None
    for name, (value, default) in others.items():
        if value is not default and not (isinstance(value, str) and value == default):
            raise ValueError(
                f"{name} must be left out with targets.masks, which says what is pruned, got "
                f"{_text.shown(value)}"
            )
    _groups.check_masks(params, target.masks, "sparsity: the target's masks")
    named = _tree.named_leaves(params)
    stacked = _tree.stacked_leaves(params, leaves.stacked, "stacked")
    # Zeros of the weights count as pruned in leaves that are prunable by default.
    reasons = _prunable.default_reasons(named, stacked)
    by_default = _groups.of_leaves(named, reasons, stacked, "global", None)
    start = _groups.first_masks(params, by_default, masks)
    wanted = jax.tree.map(jnp.logical_and, start, target.masks)
    # The masks decide which further leaves are pruned.
    pruned = [int(jnp.sum(~x)) for x in jax.tree.leaves(wanted)]
    chosen = [reason is None or count > 0 for reason, count in zip(reasons, pruned, strict=True)]
    weights = sum(leaf.size for (_, leaf), yes in zip(named, chosen, strict=True) if yes)
    if not 0 < sum(pruned) < weights:
        raise ValueError(
            f"sparsity: the target's masks must prune and keep some of the {weights:,} weights, "
            f"but prune {sum(pruned):,}"
        )
    prunable = jax.tree.structure(params).unflatten(chosen)
    leaves = leaves._replace(prunable=prunable)
    return Settled(wanted, leaves, sparsity_of(sum(pruned), weights), start)
