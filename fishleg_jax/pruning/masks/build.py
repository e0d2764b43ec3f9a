"""Scores to masks: which weights stay, as a pytree of booleans, exactly as many as asked for.

A mask has the parameters' structure and shapes; True keeps.  Leaves that may not be pruned keep the
masks they had, or are True throughout.  The threshold is found by counting the scores below a
candidate, bit by bit of the floating-point number, so that nothing is sorted or gathered.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _prunable, _tree
from fishleg_jax._branch import run_if
from fishleg_jax._checks import numbers
from fishleg_jax._devices import placement, sharding
from fishleg_jax._jit import is_traced
from fishleg_jax.inverse.base import apply_mask
from fishleg_jax.pruning.gradual.state import find_state, holds_state
from fishleg_jax.pruning.masks.groups import Groups, check_masks, make_groups, zeros_in


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
    prunable: _prunable.Selection = None,
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


def keep_highest(
    groups: Groups,
    scores: Sequence[jax.Array],
    old: Sequence[jax.Array],
    counts: Sequence[Any] | jax.Array,
) -> list[jax.Array]:
    """Masks of all leaves without the lowest scores below every threshold.

    Args:
        groups: Which leaves are pruned, and which weights share a threshold.
        scores: One array for every leaf.
        old: Masks of before; what they prune counts as lowest of all.
        counts: Number of weights to prune below every threshold, those of before included.
    """
    new, k = list(old), 0
    for group in groups.members:
        layers = groups.layers(group)
        chosen = [scores[i] for i in group], [old[i] for i in group]
        if layers is None:
            kept = _keep(*chosen, counts[k])
            k += 1
        else:
            each = jnp.stack([jnp.asarray(n) for n in counts[k : k + layers]])
            kept = _keep_layers(*chosen, each)
            k += layers
        for i, mask in zip(group, kept, strict=True):
            new[i] = mask
    return new


@jax.jit
def _keep_layers(
    scores: list[jax.Array], old: list[jax.Array], counts: jax.Array
) -> list[jax.Array]:
    """Like `_keep` for a stack of layers, each with a count of its own."""
    return sharding.automatic(jax.vmap(_without_lowest), old, scores, old, counts)


@jax.jit
def _keep(scores: list[jax.Array], old: list[jax.Array], count: Any) -> list[jax.Array]:
    """Masks without the `count` lowest scores; what is already pruned counts as lowest of all."""
    return sharding.automatic(_without_lowest, old, scores, old, count)


def _without_lowest(scores: list[jax.Array], old: list[jax.Array], count: Any) -> list[jax.Array]:
    common = _tree.wide_dtype(jnp.result_type(*scores))
    ranks = [_rank(s.astype(common), m) for s, m in zip(scores, old, strict=True)]
    dtype = ranks[0].dtype

    def at_most(threshold):
        return sum(_tree.count(r <= threshold) for r in ranks)

    low, high = jnp.array(-1, dtype), jnp.array(jnp.iinfo(dtype).max - 1, dtype)
    everything = jnp.asarray(sum(r.size for r in ranks), jnp.int32)
    threshold, number = _bisect(at_most, count, low, high, everything)
    kept = [rank > threshold for rank in ranks]

    def with_the_last(_):  # of those at the threshold only the first ones go
        at_it = [rank == threshold for rank in ranks]
        spare = sum(map(_tree.count, at_it)) - (number - count)
        gone = _first(at_it, spare)
        return [(rank >= threshold) & ~first for rank, first in zip(ranks, gone, strict=True)]

    return run_if(number > count, with_the_last, kept)


def _first(marked: list[jax.Array], number: jax.Array) -> list[jax.Array]:
    """Of what is marked in some leaves the first so many; their end is found by counting, too."""
    places = [_places(x.shape) for x in marked]
    totals = jnp.stack([_tree.count(x) for x in marked])
    wanted = jnp.clip(number - (jnp.cumsum(totals) - totals), 0, totals)

    def before(ends):
        pairs = zip(marked, places, strict=True)
        return [x & (place < ends[i]) for i, (x, place) in enumerate(pairs)]

    def counted(ends):
        return jnp.stack([_tree.count(x) for x in before(ends)])

    # of a leaf all or nothing is wanted, but of one at most: mostly there is nothing to look for
    high = jnp.where(wanted == 0, 0, jnp.asarray([x.size for x in marked], jnp.uint32))
    low = jnp.where(wanted == totals, high, 0)
    return before(_bisect(counted, wanted, low, high, totals)[0])


def _bisect(
    counted: Callable[[jax.Array], jax.Array],
    wanted: jax.Array,
    low: jax.Array,
    high: jax.Array,
    number: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A whole number in [low, high] up to which there are enough, from the highest bit downwards.

    One up to which there are exactly so many, else the smallest with more.

    Args:
        counted: how many there are up to a whole number; the larger that is, the more.
        wanted: how many are enough.
        low: the lower bound.
        high: the upper bound, up to which there are enough.
        number: how many there are up to it.

    Returns:
        The whole number, and how many there are up to it.
    """

    def halve(found):
        low, high, number = found
        middle = low + (high - low) // 2
        there = counted(middle)
        enough = there >= wanted
        # of several searches one whose bounds have met goes on until the last is over
        above = jnp.minimum(middle + 1, high)
        low = jnp.where(there == wanted, middle, jnp.where(enough, low, above))
        return low, jnp.where(enough, middle, high), jnp.where(enough, there, number)

    found = jax.lax.while_loop(lambda f: jnp.any(f[0] < f[1]), halve, (low, high, number))
    return found[1:]


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The position of every entry in the order of memory: less than 2³² in a leaf."""
    places, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return places


def _rank(score: jax.Array, mask: jax.Array) -> jax.Array:
    """An integer in the order of a non-negative score: its own bits; −1 for what is pruned."""
    integer = jnp.int64 if score.dtype == jnp.float64 else jnp.int32
    # the bits of −0.0 are those of a negative number
    return jnp.where(mask, jax.lax.bitcast_convert_type(jnp.abs(score), integer), -1)


def _check_scores(scores: Any, leaves: list, chosen: list[bool]) -> None:
    names = [name for name, _ in _tree.named_leaves(scores)]
    for name, score, yes in zip(names, leaves, chosen, strict=True):
        if yes and not is_traced(score) and not bool(jnp.all(score >= 0)):
            raise ValueError(
                f"scores must be non-negative numbers, but {name!r} has negative or NaN ones"
            )


def apply_masks(params: Any, masks: Any) -> Any:
    """The parameters with exact zeros where the masks are False.

    Args:
        params: any pytree of arrays.
        masks: a pytree of booleans of the same structure and shapes; or the state of an optimiser
            with a gradual pruning in it, whose masks are taken.

    Returns:
        A pytree like the parameters, of their dtypes.

    Raises:
        ValueError: the structures or shapes differ.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.apply_masks(jnp.array([1.0, jnp.inf]), jnp.array([True, False]))
        Array([1., 0.], dtype=float32)
    """
    if holds_state(masks):
        masks = find_state(masks).masks
    elif hasattr(masks, "report") and hasattr(masks, "masks"):
        raise ValueError(
            f"masks must be a pytree of booleans like the parameters, got a "
            f"{type(masks).__name__}: use its masks, as in apply_masks(params, result.masks)"
        )
    _tree.check_same(params, masks, "masks")
    return placement.like(apply_mask(params, masks), params)


def sparsity(params: Any, prunable: _prunable.Selection = None) -> float:
    """The fraction of the prunable weights that are exactly zero.

    Args:
        params: weights, any pytree.
        prunable: which leaves, see `make_masks`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: a `Result` in place of its weights; an invalid or empty selection.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.sparsity({"kernel": jnp.eye(2), "bias": jnp.zeros(2)})
        0.5
    """
    if hasattr(params, "report") and hasattr(params, "masks"):
        raise ValueError(
            f"params must be weights, got a {type(params).__name__}: use its params, as in "
            "sparsity(result.params)"
        )
    chosen = _prunable.select(params, prunable, "prunable")
    leaves = [x for x, yes in zip(jax.tree.leaves(params), chosen, strict=True) if yes]
    return sum(int(jnp.sum(x == 0)) for x in leaves) / max(sum(x.size for x in leaves), 1)


__all__: Sequence[str] = ("apply_masks", "make_masks", "number_to_prune", "sparsity")
