"""Finds the units of a pattern with the lowest scores, and prunes them.

Every unit has weights that it would prune: all that it still has, or of n of m weights the m − n
with the lowest scores.  Units are ranked by the mean score of these, or with costs by the sum of
their scores over the sum of their costs, and go one by one, ties by position, as long as no more
weights are pruned than are asked for.  The last one is found like the threshold of single weights,
by counting.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._tiles import Tile, join, split
from fishleg_jax.pruning.masks.layout import Layout
from fishleg_jax.pruning.masks.ranks import places, rank

Member = tuple[int, Tile]


def without_lowest_units(
    layout: Layout,
    scores: list[jax.Array],
    old: list[jax.Array],
    count: Any,
    costs: list[jax.Array] | None = None,
) -> list[jax.Array]:
    """Masks in which the units with the lowest scores are pruned.

    Args:
        layout: Tiles of the leaves.
        scores: Scores of the weights, one array for every leaf.
        old: Previous masks.
        count: Number of weights to prune, at most, including those already pruned; units that have
            nothing left to prune take none of it.
        costs: Costs of the weights, one array for every leaf; None for one each.
    """
    if not layout.families:  # smaller than a tile
        return old
    common = _tree.wide_dtype(jnp.result_type(*scores))
    scores = [s.astype(common) for s in scores]
    # Decide for every unit which weights it would prune, and its rank.
    proposed = {
        (leaf, tile): _proposed(layout, split(scores[leaf], tile), split(old[leaf], tile))
        for family in layout.families
        for leaf, tile in family
    }
    ranks, sizes = [], []
    for family in layout.families:
        value, number = _mean_scores(family, scores, proposed, costs)
        ranks.append(rank(value, number > 0))
        sizes.append(number)
    before = sum(map(_tree.count, [~m for m in old]))

    def masks_of(gone: list[jax.Array]) -> list[jax.Array]:
        masks = list(old)
        for family, yes in zip(layout.families, gone, strict=True):
            for leaf, tile in family:
                grid = _grid(proposed[leaf, tile])
                repeated = jnp.tile(yes.reshape(-1), math.prod(grid) // yes.size)
                out = proposed[leaf, tile] & repeated.reshape(grid)[..., None]
                masks[leaf] &= ~join(out, tile, jnp.zeros_like(masks[leaf]))
        return masks

    def pruned(gone: list[jax.Array]) -> jax.Array:
        if not layout.disjoint:  # a weight may lie in two units
            return sum(map(_tree.count, [~m for m in masks_of(gone)]))
        pairs = zip(gone, sizes, strict=True)
        return before + sum(jnp.sum(jnp.where(yes, n, 0), dtype=jnp.int32) for yes, n in pairs)

    # Find the highest rank up to which there are not too many.
    dtype = ranks[0].dtype
    below = lambda threshold: [r <= threshold for r in ranks]
    bounds = jnp.array(-1, dtype), jnp.array(jnp.iinfo(dtype).max - 1, dtype)
    threshold = _last(lambda x: pruned(below(x)) <= count, *bounds)
    # Of the units with the next rank, take the first.
    following = [jnp.min(jnp.where(r > threshold, r, jnp.iinfo(dtype).max)) for r in ranks]
    next_rank = jnp.stack(following).min()
    orders, start = [], 0
    for r in ranks:
        orders.append(places(r.shape) + jnp.uint32(start))
        start += r.size

    def first(end: jax.Array) -> list[jax.Array]:
        triples = zip(ranks, orders, strict=True)
        return [(r <= threshold) | ((r == next_rank) & (order < end)) for r, order in triples]

    bounds = jnp.array(0, jnp.uint32), jnp.array(start + 1, jnp.uint32)
    return masks_of(first(_last(lambda x: pruned(first(x)) <= count, *bounds)))


def _grid(tiles: jax.Array) -> tuple[int, ...]:
    return tiles.shape[:-1]


def _proposed(layout: Layout, scores: jax.Array, old: jax.Array) -> jax.Array:
    """Weights that every tile of one leaf would prune, in tiles, without those already pruned."""
    if layout.keep == 0:
        return old
    ranks = rank(scores, old)
    position, lower = jnp.arange(ranks.shape[-1]), jnp.zeros(ranks.shape, jnp.int32)
    for j in range(ranks.shape[-1]):
        other = ranks[..., j : j + 1]
        lower += (other < ranks) | ((other == ranks) & (j < position))
    return (lower < ranks.shape[-1] - layout.keep) & old


def _mean_scores(
    family: tuple[Member, ...],
    scores: list[jax.Array],
    proposed: dict[Member, jax.Array],
    costs: list[jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Mean score of the weights that every unit would prune, or per cost, and their number."""
    summed = lambda of_leaf: _sum(
        [of_leaf(proposed[leaf, tile], leaf, tile) for leaf, tile in family]
    )
    over = lambda arrays: summed(
        lambda out, leaf, tile: jnp.sum(jnp.where(out, split(arrays[leaf], tile), 0), axis=-1)
    )
    number = summed(lambda out, *_: jnp.sum(out, axis=-1, dtype=jnp.int32))
    price = number if costs is None else over(costs)
    return over(scores) / jnp.where(number > 0, price, 1), number


def _sum(parts: list[jax.Array]) -> jax.Array:
    """Sum by unit: grids of coupled leaves have units along different axes, or repeat them."""
    if len(parts) == 1:
        return parts[0]
    units = min(part.size for part in parts)
    return sum(part.reshape(-1, units).sum(0) for part in parts)


def _last(fits: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The last whole number in [low, high) that fits, if those that fit come first; else `low`."""

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        good = fits(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    return jax.lax.while_loop(lambda b: jnp.any(b[1] - b[0] > 1), halve, (low, high))[0]
