"""The lowest scores of groups of leaves, found by counting.

The threshold is found bit by bit of the floating-point number, by counting the scores below a
candidate, so that nothing is sorted or gathered.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._devices import sharding
from fishleg_jax.pruning.masks.groups import Groups


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
