"""The weights nearest to the threshold of a mask, which a selection is free to choose from."""

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
    """Some weights of a pytree: the kept ones of lowest score, and the pruned ones of highest.

    Attributes:
        leaves: in which leaf each is, by its number in the tree's order.
        places: where in the flattened leaf.
        pruned: whether the mask prunes it.
    """

    leaves: np.ndarray  # shape=(n,), int32
    places: np.ndarray  # shape=(n,), int32
    pruned: np.ndarray  # shape=(n,), bool


def find_border(old_masks: Any, new_masks: Any, scores: Any, half: int, scope: str) -> Border:
    """Up to `half` weights on either side of the threshold, nearest first by ratio to it.

    Args:
        old_masks: masks before; what they prune is on neither side.
        new_masks: masks after, of which every threshold is read.
        scores: those that made them; infinite for weights that may not be pruned.
        half: how many on each side at most.
        scope: `global` or `layer`; with the latter every leaf has a threshold of its own.

    Returns:
        The border; empty where nothing newly pruned or nothing prunable is left.
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
    # a leaf that loses nothing has no weight to swap with
    losing = [jnp.isfinite(h) for h in highest]
    above, below = [], []
    for score, mask, gone, threshold, yes in zip(scores, new, lost, highest, losing, strict=True):
        ratio = score / jnp.where(threshold > 0, threshold, 1)
        above.append(jnp.where(mask & yes, ratio, jnp.inf))
        below.append(jnp.where(gone, -ratio, jnp.inf))
    return [_lowest(side, half) for side in (above, below)]


def _lowest(values: list, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest numbers of all leaves: first of every leaf, then of those."""
    parts = [jax.lax.top_k(-v.reshape(-1), min(count, v.size)) for v in values]
    leaves = [jnp.full(v.shape, i, jnp.int32) for i, (v, _) in enumerate(parts)]
    every = jnp.concatenate([v for v, _ in parts])
    best, chosen = jax.lax.top_k(every, min(count, every.size))
    places = jnp.concatenate([p for _, p in parts])
    return -best, jnp.concatenate(leaves)[chosen], places[chosen]


def gather(tree: Any, leaves: jax.Array, places: jax.Array) -> jax.Array:
    """The border's entries of a pytree, as a vector."""
    parts = [
        jnp.where(leaves == i, x.reshape(-1)[jnp.minimum(places, x.size - 1)], 0)
        for i, x in enumerate(jax.tree.leaves(tree))
    ]
    return sum(parts)


def spread(like: Any, leaves: jax.Array, places: jax.Array, values: jax.Array) -> Any:
    """A pytree that is a vector's on the border and zero elsewhere."""
    flat, tree = jax.tree.flatten(like)
    parts = []
    for i, x in enumerate(flat):
        inside = jnp.where(leaves == i, places, x.size)  # beyond the end, which is dropped
        part = jnp.zeros(x.size, _tree.wide_dtype(x.dtype))
        parts.append(part.at[inside].set(values.astype(part.dtype), mode="drop").reshape(x.shape))
    return tree.unflatten(parts)


def two_sided(edge: Border) -> bool:
    """Whether there is anything to swap."""
    return bool(edge.pruned.any() and not edge.pruned.all())


def swap_groups(edge: Border, scope: str) -> np.ndarray:
    """Numbers of what may be swapped: weights of equal ones."""
    return edge.leaves if scope == "layer" else np.zeros_like(edge.leaves)


def lost_beyond(old_masks: Any, new_masks: Any, leaves: jax.Array, places: jax.Array) -> Any:
    """What is newly pruned and not on the border."""
    lost = jax.tree.map(lambda old, new: old & ~new, old_masks, new_masks)
    return moved(lost, leaves, places, jnp.ones(leaves.shape, bool))


def moved(masks: Any, leaves: jax.Array, places: jax.Array, pruned: jax.Array) -> Any:
    """The masks with those of the border in place."""
    flat, tree = jax.tree.flatten(masks)
    moved = []
    for i, mask in enumerate(flat):
        inside = jnp.where(leaves == i, places, mask.size)  # beyond the end, which is dropped
        changed = mask.reshape(-1).at[inside].set(~pruned, mode="drop")
        moved.append(changed.reshape(mask.shape))
    return tree.unflatten(moved)
