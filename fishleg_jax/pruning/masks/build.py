"""Scores to masks: which weights stay, as a pytree of booleans, exactly as many as asked for.

A mask has the parameters' structure and shapes; True keeps.  Leaves that may not be pruned keep the
masks they had, or are True throughout.
"""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _prunable, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._devices import placement
from fishleg_jax._jit import is_traced
from fishleg_jax.pruning.masks.groups import Groups, check_masks, make_groups, zeros_in
from fishleg_jax.pruning.masks.lowest import keep_highest


def number_to_prune(sparsity: float, weights: int) -> int:
    """`floor(sparsity · weights)` in decimal: 0.29 of 100 is 29, though 0.29 * 100 is 28.999…

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        weights: how many weights there are.

    Returns:
        How many of them are pruned.

    Raises:
        ValueError: the sparsity is not a number in [0, 1).

    Example:
        >>> number_to_prune(0.29, 100)
        29
    """
    numbers.check_number(sparsity, "sparsity", lambda x: 0 <= x < 1, "a number in [0, 1)")
    return math.floor(Fraction(str(sparsity)) * weights)


def make_masks(
    scores: Any,
    sparsity: float,
    *,
    scope: str = "global",
    prunable: _prunable.LeafSelection = None,
    masks: Any | None = None,
    stacked: _tree.Stacked = None,
) -> Any:
    """Prunes the weights of the lowest scores, `floor(sparsity · n)` of the n prunable ones.

    Ties are broken by position: of equal scores the first in the tree's order goes first.  Under
    `jit` nobody can look at scores and masks to refuse them: a negative score then counts by its
    magnitude, NaN as the highest, and masks of before with too many zeros keep them all.

    Args:
        scores: a pytree of non-negative numbers, such as `obs_saliency` makes.
        sparsity: the fraction of prunable weights that are zero, in [0, 1); a number from Python,
            under `jit`, too.
        scope: `global` for one threshold over all prunable leaves, `layer` for one in each leaf.
        prunable: Leaves that may be pruned: regular expressions over key paths; a mapping of these
            to True or False, where the first match decides; a pytree of booleans like the scores,
            or a prefix of it; or a predicate `(name, leaf)`, which is asked of the scores here (in
            `prune_one_shot` and in a chain of the weights).  By default all but vectors and leaves
            with the name of a bias, a normalisation's parameter, an embedding or a position.
        masks: Masks of before.  Pruned weights stay pruned, in leaves that are not prunable too,
            and those of prunable leaves count.
        stacked: Leaves with a leading axis of layers, by regular expressions or a predicate: with
            `scope="layer"` each layer has a threshold of its own.

    Returns:
        A pytree of booleans; False is pruned.

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown scope, nothing prunable, scores that are
            negative or NaN, fewer zeros asked for than the masks of before have.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.make_masks({"w": jnp.array([[3.0, 1.0], [1.0, 2.0]])}, 0.5)["w"].tolist()
        [[True, False], [False, True]]
    """
    groups = make_groups(scores, prunable, scope, stacked)
    if masks is not None:
        check_masks(scores, masks)
        if not is_traced(masks):
            check_room(groups, sparsity, sum(map(int, zeros_in(groups, masks))))
    return extend(groups, scores, sparsity, masks)


def check_room(groups: Groups, sparsity: float, pruned: int) -> None:
    """Raises a ValueError where fewer zeros are asked for than there are."""
    count = sum(number_to_prune(sparsity, size) for size in groups.sizes)
    if pruned > count:
        raise ValueError(
            f"masks already prune {pruned} weights where the sparsity asks for {count}: ask for "
            "more, or start with masks=None, as zeros that the weights have count as pruned"
        )


def extend(groups: Groups, scores: Any, sparsity: float, masks: Any | None = None) -> Any:
    """The masks of `make_masks`, of leaves and thresholds that are decided already.

    Args:
        groups: Which leaves are pruned, and which weights share a threshold.
        scores: A pytree of non-negative numbers.
        sparsity: Fraction of the prunable weights that are zero afterwards, in [0, 1).
        masks: Masks of before; None for none.  Nothing comes back: a threshold below which more
            weights are pruned already than its share keeps them pruned.

    Raises:
        ValueError: scores that are negative or NaN.
    """
    leaves, tree = jax.tree.flatten(scores)
    counts = [number_to_prune(sparsity, size) for size in groups.sizes]
    if masks is None:
        masks = tree.unflatten(jnp.ones(x.shape, bool) for x in leaves)
    old = jax.tree.leaves(masks)
    _check_scores(scores, leaves, groups.chosen)
    before = zeros_in(groups, masks)
    largest = jnp.maximum if is_traced(before) else lambda count, there: max(count, int(there))
    counts = [largest(*pair) for pair in zip(counts, before, strict=True)]
    return placement.like(tree.unflatten(keep_highest(groups, leaves, old, counts)), scores)


def _check_scores(scores: Any, leaves: list, chosen: list[bool]) -> None:
    names = [name for name, _ in _tree.named_leaves(scores)]
    for name, score, yes in zip(names, leaves, chosen, strict=True):
        if yes and not is_traced(score) and not bool(jnp.all(score >= 0)):
            raise ValueError(
                f"scores must be non-negative numbers, but {name!r} has negative or NaN ones"
            )
