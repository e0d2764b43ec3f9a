"""Builds masks from scores: pytrees of booleans that prune exactly the requested number of weights.

A mask has the parameters' structure and shapes; True keeps.  Leaves that may not be pruned retain
their previous masks, or are True throughout.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _prunable, _tree
from fishleg_jax._devices import placement
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax.pruning.masks.densities import Scope, exact_counts, number_to_prune
from fishleg_jax.pruning.masks.groups import Groups, check_masks, make_groups, zeros_in
from fishleg_jax.pruning.masks.lowest import keep_highest
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.masks.targets import target_of


def make_masks(
    scores: Any,
    sparsity: float | None = None,
    *,
    scope: Scope = "global",
    prunable: _prunable.LeafSelection = None,
    masks: Any | None = None,
    stacked: _tree.Stacked = None,
    pattern: Pattern | None = None,
) -> Any:
    """Prunes the weights with the lowest scores, `floor(sparsity · n)` of the n prunable ones.

    Ties are broken by position: of equal scores the first in the tree's order goes first.  Scores
    and masks can't be validated under `jit`: there a negative score counts by its magnitude, NaN as
    the highest, and previous masks with too many zeros keep them all.

    Args:
        scores: Pytree of non-negative numbers, such as `obs_saliency` returns.
        sparsity: Fraction of prunable weights that are zero, in [0, 1); a Python number, also under
            `jit`.  None for the one that a pattern of n:m, or densities by name, give.
        scope: `global`, the default, for one threshold over all prunable leaves, `layer` for one in
            each; `erk` for densities of the leaves in proportion to the sum of their dimensions
            over their product (of each layer of a stacked one), at most 1, with the total as exact
            as for `global`; or a mapping from regular expressions over key paths to densities, the
            fractions of a leaf to keep, where the first match decides and other leaves stay dense.
        prunable: Leaves that may be pruned: regular expressions over key paths; a mapping of these
            to True or False, where the first match decides; a pytree of booleans like the scores,
            or a prefix of it; or a predicate `(name, leaf)`, called here on the scores (in
            `prune_one_shot` and in a chain on the weights).  By default all but vectors and leaves
            with the name of a bias, a normalisation's parameter, an embedding or a position.  Not
            `flj.Leaves`, which prunings take.
        masks: Previous masks; None for none.  Their pruned weights stay pruned, also in leaves that
            are not prunable, and those of prunable leaves count.
        stacked: Leaves with a leading axis of layers, by regular expressions or a predicate: with
            `scope="layer"` each layer has its own threshold.  None for no such leaves.
        pattern: Weights that are pruned together, one of `flj.patterns`; None for single weights.
            Whole groups go, in the order of their mean scores, as long as no more weights go than
            the sparsity says.

    Returns:
        A pytree of booleans; False is pruned.

    Raises:
        ValueError: A sparsity outside [0, 1) or beyond what a pattern can prune, an unknown scope,
            nothing prunable, scores that are negative or NaN, a sparsity below that of the previous
            masks, a pattern that does not fit the leaves.

    References:
        Evci et al., Rigging the lottery: making all tickets winners, ICML 2020, for `erk`.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.make_masks({"w": jnp.array([[3.0, 1.0], [1.0, 2.0]])}, 0.5)["w"].tolist()
        [[True, False], [False, True]]
    """
    groups = make_groups(scores, prunable, scope, stacked, pattern)
    sparsity = target_of(groups, sparsity)
    if masks is not None:
        check_masks(scores, masks)
        if not is_traced(masks):
            check_room(groups, sparsity, sum(map(int, zeros_in(groups, masks))))
    return extend(groups, scores, sparsity, masks)


def check_room(groups: Groups, sparsity: float, pruned: int) -> None:
    """Raises a ValueError if masks already prune more weights than the sparsity asks for."""
    count = sum(exact_counts(groups, sparsity))
    if pruned > count:
        raise ValueError(
            f"masks already prune {pruned} weights, but the sparsity requests only {count}: use a "
            "higher one, or pass masks=None, because zeros in the weights count as pruned"
        )


def extend(
    groups: Groups,
    scores: Any,
    sparsity: float,
    masks: Any | None = None,
    costs: Any | None = None,
) -> Any:
    """Masks of `make_masks`, for leaves and thresholds that are already decided.

    Args:
        groups: Which leaves are pruned, and which weights share a threshold.
        scores: A pytree of non-negative numbers.
        sparsity: Fraction of the prunable weights that are zero afterwards, in [0, 1).
        masks: Previous masks; None for none.  Pruned weights stay pruned, even below a threshold
            with more of them than its share.
        costs: Cost of each weight, numbers or arrays by leaf, by whose sum over a group of the
            pattern its score is divided; None for one each.

    Raises:
        ValueError: Scores that are negative or NaN.
    """
    leaves, tree = jax.tree.flatten(scores)
    if masks is None:
        masks = tree.unflatten(jnp.ones(x.shape, bool) for x in leaves)
    old = jax.tree.leaves(masks)
    _check_scores(scores, leaves, groups.chosen)
    # Number of weights to prune below every threshold; weights already pruned stay pruned.
    before = zeros_in(groups, masks)
    largest = jnp.maximum if is_traced(before) else max
    before = before if is_traced(before) else list(map(int, jax.device_get(before)))
    counts = list(map(largest, exact_counts(groups, sparsity, before), before))
    prices = None if costs is None else jax.tree.leaves(costs)
    kept = keep_highest(groups, leaves, old, counts, prices)
    return placement.like(tree.unflatten(kept), scores)


def _check_scores(scores: Any, leaves: list, chosen: list[bool]) -> None:
    if is_traced(leaves):
        return
    valid = np.asarray(jitted(_not_negative)(leaves)) | ~np.array(chosen, bool)
    if not valid.all():
        name, _ = _tree.named_leaves(scores)[valid.argmin()]
        raise ValueError(
            f"scores must be non-negative numbers, but {name!r} has negative or NaN scores"
        )


def _not_negative(leaves: list) -> jax.Array:
    return jnp.stack([jnp.all(leaf >= 0) for leaf in leaves])


__all__ = ["check_room", "extend", "make_masks", "number_to_prune"]
