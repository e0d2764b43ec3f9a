"""Border of a mask: the weights nearest to its threshold, free for a selection to choose from."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree

# (params, old_masks, new_masks, scores, curvature, estimator, state, scope) -> masks
Selection = Callable[[Any, Any, Any, Any, Any, Any, Any, str], Any]


class Border(NamedTuple):
    """Positions of some weights of a pytree: kept ones with low scores, and pruned ones with high.

    Attributes:
        leaves: Number of each weight's leaf, in the tree's order.
        places: Position in the flattened leaf.
        pruned: Whether the mask prunes it.
    """

    leaves: np.ndarray  # shape=(n,), int32
    places: np.ndarray  # shape=(n,), int32
    pruned: np.ndarray  # shape=(n,), bool


def find_border(old_masks: Any, new_masks: Any, scores: Any, half: int, scope: str) -> Border:
    """Finds up to `half` weights on either side of the threshold, nearest first by ratio to it.

    Args:
        old_masks: Masks before; weights that they prune are on neither side.
        new_masks: Masks after, from which the thresholds are read.
        scores: Scores behind these masks; infinite for weights that may not be pruned.
        half: Largest number of weights on each side.
        scope: `global` for one threshold, or `layer` for one in every leaf.

    Returns:
        The border; empty if nothing newly pruned or nothing prunable is left.
    """
    trees = map(jax.tree.leaves, (old_masks, new_masks, scores))
    found = _nearest(*trees, half, scope == "layer")
    sides = []
    for pruned, (distances, leaves, places) in zip((False, True), found, strict=True):
        there = np.isfinite(distances)
        leaves, places = np.asarray(leaves)[there], np.asarray(places)[there]
        sides.append(Border(leaves, places, np.full(len(leaves), pruned)))
    return Border(*map(np.concatenate, zip(*sides, strict=True)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _nearest(old: list, new: list, scores: list, half: int, layered: bool) -> list:
    lost = [o & ~n for o, n in zip(old, new, strict=True)]
    highest = [
        jnp.max(s, where=gone, initial=-jnp.inf) for s, gone in zip(scores, lost, strict=True)
    ]
    if not layered:
        highest = [jnp.max(jnp.stack(highest))] * len(scores)
    # a leaf without newly pruned weights has nothing to swap
    losing = [jnp.isfinite(h) for h in highest]
    above, below = [], []
    for score, mask, gone, threshold, yes in zip(scores, new, lost, highest, losing, strict=True):
        ratio = score / jnp.where(threshold > 0, threshold, 1)
        above.append(jnp.where(mask & yes, ratio, jnp.inf))
        below.append(jnp.where(gone, -ratio, jnp.inf))
    return [_lowest(side, half) for side in (above, below)]


def _lowest(values: list, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lowest numbers of all leaves: first of every leaf, then of those."""
    parts = [jax.lax.top_k(-v.reshape(-1), min(count, v.size)) for v in values]
    leaves = [jnp.full(v.shape, i, jnp.int32) for i, (v, _) in enumerate(parts)]
    every = jnp.concatenate([v for v, _ in parts])
    best, chosen = jax.lax.top_k(every, min(count, every.size))
    places = jnp.concatenate([p for _, p in parts])
    return -best, jnp.concatenate(leaves)[chosen], places[chosen]


def gather(tree: Any, leaves: jax.Array, places: jax.Array) -> jax.Array:
    """Reads the border's entries of a pytree into a vector."""
    parts = [
        jnp.where(leaves == i, x.reshape(-1)[jnp.minimum(places, x.size - 1)], 0)
        for i, x in enumerate(jax.tree.leaves(tree))
    ]
    return sum(parts)


def scatter(like: Any, leaves: jax.Array, places: jax.Array, values: jax.Array) -> Any:
    """Writes a vector to the border of a pytree that is zero elsewhere."""
    flat, tree = jax.tree.flatten(like)
    parts = []
    for i, x in enumerate(flat):
        inside = jnp.where(leaves == i, places, x.size)  # past the end, so dropped
        part = jnp.zeros(x.size, _tree.wide_dtype(x.dtype))
        parts.append(part.at[inside].set(values.astype(part.dtype), mode="drop").reshape(x.shape))
    return tree.unflatten(parts)


def two_sided(edge: Border) -> bool:
    """Whether there is anything to swap."""
    return bool(edge.pruned.any() and not edge.pruned.all())


def swap_groups(edge: Border, scope: str) -> np.ndarray:
    """Group of every border weight; weights of one group may be swapped."""
    return edge.leaves if scope == "layer" else np.zeros_like(edge.leaves)


def lost_beyond(old_masks: Any, new_masks: Any, leaves: jax.Array, places: jax.Array) -> Any:
    """Masks of the weights that are newly pruned and not on the border."""
    lost = jax.tree.map(lambda old, new: old & ~new, old_masks, new_masks)
    return moved(lost, leaves, places, jnp.ones(leaves.shape, bool))


def moved(masks: Any, leaves: jax.Array, places: jax.Array, pruned: jax.Array) -> Any:
    """Replaces the border's entries of masks."""
    flat, tree = jax.tree.flatten(masks)
    moved = []
    for i, mask in enumerate(flat):
        inside = jnp.where(leaves == i, places, mask.size)  # past the end, so dropped
        changed = mask.reshape(-1).at[inside].set(~pruned, mode="drop")
        moved.append(changed.reshape(mask.shape))
    return tree.unflatten(moved)
