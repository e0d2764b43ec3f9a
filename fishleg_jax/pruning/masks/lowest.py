"""Finds the lowest scores of groups of leaves by counting.

The threshold is found bit by bit of the floating-point number, by counting the scores below a
candidate, so that nothing is sorted or gathered.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._devices import sharding
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.masks.layout import Layout
from fishleg_jax.pruning.masks.ranks import places, rank
from fishleg_jax.pruning.masks.units import without_lowest_units


def keep_highest(
    groups: Groups,
    scores: Sequence[jax.Array],
    old: Sequence[jax.Array],
    counts: Sequence[Any] | jax.Array,
    costs: Sequence[Any] | None = None,
) -> list[jax.Array]:
    """Masks of all leaves without the lowest scores below every threshold.

    Args:
        groups: Leaves that are pruned, and weights that share a threshold.
        scores: One array for every leaf.
        old: Previous masks; weights that they prune count as lowest of all.
        counts: Number of weights to prune below every threshold, including those already pruned.
        costs: Cost of the weights of each leaf, a number or an array, for the groups of a pattern;
            None for one each.
    """
    if costs is not None:
        pairs = zip(scores, costs, strict=True)
        costs = [jnp.broadcast_to(jnp.asarray(c, s.dtype), s.shape) for s, c in pairs]
    new, k = list(old), 0
    for group in groups.members:
        layers = groups.layers(group)
        chosen = [scores[i] for i in group], [old[i] for i in group]
        part = None if groups.pattern is None else groups.layout.part(group, layers is not None)
        own = None if costs is None else [costs[i] for i in group]
        if layers is None:
            kept = _keep(*chosen, counts[k], part, own)
            k += 1
        else:
            each = jnp.stack([jnp.asarray(n) for n in counts[k : k + layers]])
            kept = _keep_layers(*chosen, each, part, own)
            k += layers
        for i, mask in zip(group, kept, strict=True):
            new[i] = mask
    return new


@functools.partial(jax.jit, static_argnums=3)
def _keep_layers(
    scores: list[jax.Array],
    old: list[jax.Array],
    counts: jax.Array,
    layout: Layout | None = None,
    costs: list[jax.Array] | None = None,
) -> list[jax.Array]:
    """Keeps the highest like `_keep`, for a stack of layers, each with its own count."""
    arguments = (scores, old, counts) if costs is None else (scores, old, counts, costs)
    return sharding.automatic(jax.vmap(_lowest_of(layout)), old, *arguments)


@functools.partial(jax.jit, static_argnums=3)
def _keep(
    scores: list[jax.Array],
    old: list[jax.Array],
    count: Any,
    layout: Layout | None = None,
    costs: list[jax.Array] | None = None,
) -> list[jax.Array]:
    """Masks without the `count` lowest scores; weights already pruned count as lowest of all."""
    arguments = (scores, old, count) if costs is None else (scores, old, count, costs)
    return sharding.automatic(_lowest_of(layout), old, *arguments)


def _lowest_of(layout: Layout | None) -> Callable[..., list[jax.Array]]:
    """Function that prunes single weights, or the units of a pattern."""
    return _without_lowest if layout is None else functools.partial(without_lowest_units, layout)


def _without_lowest(scores: list[jax.Array], old: list[jax.Array], count: Any) -> list[jax.Array]:
    common = _tree.wide_dtype(jnp.result_type(*scores))
    ranks = [rank(s.astype(common), m) for s, m in zip(scores, old, strict=True)]
    dtype = ranks[0].dtype

    def at_most(threshold):
        return sum(_tree.count(r <= threshold) for r in ranks)

    # Find the lowest threshold that prunes enough.
    low, high = jnp.array(-1, dtype), jnp.array(jnp.iinfo(dtype).max - 1, dtype)
    everything = jnp.asarray(sum(r.size for r in ranks), jnp.int32)
    threshold, number = _bisect(at_most, count, low, high, everything)
    kept = [rank > threshold for rank in ranks]

    def with_the_last(_):  # prune only the first of those at the threshold
        at_it = [rank == threshold for rank in ranks]
        spare = sum(map(_tree.count, at_it)) - (number - count)
        gone = _first(at_it, spare)
        return [(rank >= threshold) & ~first for rank, first in zip(ranks, gone, strict=True)]

    return run_if(number > count, with_the_last, kept)


def _first(marked: list[jax.Array], number: jax.Array) -> list[jax.Array]:
    """Marks the first `number` of the marked entries; the end is found by counting, too."""
    positions = [places(x.shape) for x in marked]
    totals = jnp.stack([_tree.count(x) for x in marked])
    wanted = jnp.clip(number - (jnp.cumsum(totals) - totals), 0, totals)

    def before(ends):
        pairs = zip(marked, positions, strict=True)
        return [x & (place < ends[i]) for i, (x, place) in enumerate(pairs)]

    def counted(ends):
        return jnp.stack([_tree.count(x) for x in before(ends)])

    # all or none of each leaf is wanted, except for at most one: mostly no search is needed
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
    """Bisects for a whole number in [low, high] up to which there are enough, from the highest bit.

    Finds one up to which there are exactly as many as wanted, else the smallest with more.

    Args:
        counted: Function that counts entries up to a whole number; it does not decrease.
        wanted: Number of entries that are enough.
        low: Lower bound.
        high: Upper bound, up to which there are enough.
        number: Number of entries up to the upper bound.

    Returns:
        The whole number, and the number of entries up to it.
    """

    def halve(found):
        low, high, number = found
        middle = low + (high - low) // 2
        there = counted(middle)
        enough = there >= wanted
        # of several searches, one whose bounds have met goes on until the last is done
        above = jnp.minimum(middle + 1, high)
        low = jnp.where(there == wanted, middle, jnp.where(enough, low, above))
        return low, jnp.where(enough, middle, high), jnp.where(enough, there, number)

    found = jax.lax.while_loop(lambda f: jnp.any(f[0] < f[1]), halve, (low, high, number))
    return found[1:]
