"""Scores of the groups of a pattern, by their own blocks of the inverse Fisher.

A group B that is pruned as a whole raises the loss by `½ w_Bᵀ [(F⁻¹)_BB]⁻¹ w_B` if all other
weights make up for it (`obs`), by `½ w_Bᵀ F_BB w_B` if none moves (`obd`).  Of an n:m group the set
of m − n weights with the lowest such score is found among all of them.

The scores are returned as scores of single weights, so that all that ranks, sums and reports these
serves groups as well: the weights that a group would prune share its score equally, and those of
an n:m group that it would keep get more than twice such a share.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._devices import sharding
from fishleg_jax._jit import jitted
from fishleg_jax._tiles import join, split
from fishleg_jax.inverse._blocks import Pieces
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.scores import Saliency

UNROLLED = 4  # size up to which an elimination is unrolled


def of_groups(
    groups: Groups,
    saliency: Saliency,
    estimator: InverseFisher,
    states: tuple[Any, Any],
    params: Any,
    free: Any,
    gradient: Any | None,
    scores: Any,
) -> Any:
    """Scores of the weights in which those of a group share the score of the group.

    Blocks are dense up to 64 weights.  Those of larger groups, as of most units, are exact for the
    Kronecker products of FishLeg and K-FAC where a unit covers all axes but one; else the group
    gets the sum of the scores of its weights, as it does where coupled axes meet in a leaf, and
    across the leaves of a unit.  Both ignore that some of a unit's weights may be pruned already.

    Args:
        groups: Leaves that are pruned, and their pattern.
        saliency: Name of the scores; those of a function and magnitudes are added up as they are.
        estimator: Estimate of the inverse Fisher.
        states: Its state prepared for products, and before that.
        params: Weights to score.
        free: Masks of the weights that are free to be pruned or moved.
        gradient: Gradient of the loss for first-order OBS scores; None for a gradient of zero.
        scores: Scores of the single weights.

    Returns:
        A pytree like the scores.
    """
    single = callable(saliency) or saliency == "magnitude" or estimator.blocks is None
    if groups.pattern is None or single:
        return scores
    compiled = jitted(_of_groups, estimator, groups, saliency)
    return compiled(states, params, free, gradient, scores)


def _of_groups(estimator, groups, saliency, states, params, free, gradient, scores):
    layout, number = groups.layout, len(groups.names)
    tiles = tuple(own[0] if len(own := layout.tiles_of(i)) == 1 else None for i in range(number))

    def shared(states, params, free, gradient, scores):
        target = params = _tree.apply_mask(_tree.widen(params), free)
        if gradient is not None:
            step = estimator.multiply(states[0], gradient, free)
            target = jax.tree.map(jnp.subtract, params, step)
        blank = [None] * number
        obs = damage = blank
        if saliency != "obd":
            obs = estimator.blocks(states[0], target, tiles, False)
        if saliency in ("obd", "mixture"):
            damage = estimator.blocks(states[1], params, tiles, True)
        leaves, tree = jax.tree.flatten(scores)
        for i, kept in enumerate(jax.tree.leaves(free)):
            if obs[i] is not None or damage[i] is not None:
                pieces = obs[i], damage[i]
                cut = split(leaves[i], tiles[i]), split(kept, tiles[i])
                own = _of_tiles(layout.keep, pieces, *cut)
                leaves[i] = join(own.astype(leaves[i].dtype), tiles[i], leaves[i])
        return tree.unflatten(leaves)

    # the algebra of blocks is left to the compiler, also under Explicit axes
    arguments = states, params, free, gradient, scores
    return sharding.automatic(shared, scores, *arguments)


def _of_tiles(
    keep: int, pieces: tuple[Pieces | None, Pieces | None], scores: jax.Array, free: jax.Array
) -> jax.Array:
    """Shares of the weights of one leaf's tiles, (*grid, size), from the blocks of the tiles."""
    obs, damage = (p if p is None else _of_free(p, free) for p in pieces)
    if keep == 0:
        number = jnp.maximum(jnp.sum(free, axis=-1), 1)
        total = _score(*(p if p is None else (p.coordinates, p.matrices) for p in (obs, damage)))
        return jnp.where(free, (total / number)[..., None], scores)
    # Compare all sets of weights that the tile may prune.
    size = free.shape[-1]
    sets = np.array(list(itertools.combinations(range(size), size - keep)))
    gone = size - jnp.sum(free, axis=-1)

    def compare(best, members):
        cut = [
            None
            if p is None
            else (
                jnp.take(p.coordinates, members, axis=-1),
                jnp.take(jnp.take(p.matrices, members, axis=-1), members, axis=-2),
            )
            for p in (obs, damage)
        ]
        # a set takes in what is pruned already, or is part of it
        inside = jnp.sum(~jnp.take(free, members, axis=-1), axis=-1)
        total = jnp.where(inside == jnp.minimum(gone, size - keep), _score(*cut), jnp.inf)
        marks = jnp.zeros(size, bool).at[members].set(True)
        lower = total < best[0]
        return (jnp.where(lower, total, best[0]), jnp.where(lower[..., None], marks, best[1])), None

    start = jnp.full(free.shape[:-1], jnp.inf, scores.dtype), jnp.zeros_like(free)
    (total, chosen), _ = jax.lax.scan(compare, start, sets)
    share = total / jnp.maximum(jnp.sum(chosen & free, axis=-1), 1)
    return jnp.where(chosen, share[..., None], 2 * share[..., None] + scores)


def _of_free(pieces: Pieces, free: jax.Array) -> Pieces:
    """Pieces without the weights that are pruned already, where a piece is a block of weights."""
    coordinates, matrices = pieces
    if coordinates.shape[-2] > 1 or coordinates.shape[-1] != free.shape[-1]:
        return pieces
    kept = free[..., None, :]
    eye = jnp.eye(kept.shape[-1], dtype=matrices.dtype)
    both = kept[..., :, None] & kept[..., None, :]
    return Pieces(jnp.where(kept, coordinates, 0), jnp.where(both, matrices, eye))


def _score(obs: tuple | None, damage: tuple | None) -> jax.Array:
    """Score of every tile: `obs`, `obd`, or their geometric mean if both are given."""
    if damage is None:
        return _through_inverse(*obs)
    coordinates, matrices = damage
    product = jnp.einsum("...i,...ij,...j->...", coordinates, matrices, coordinates)
    lost = jnp.maximum(jnp.sum(product, axis=-1), 0) / 2  # rounding may leave less
    return lost if obs is None else jnp.sqrt(lost) * jnp.sqrt(_through_inverse(*obs))


def _through_inverse(coordinates: jax.Array, matrices: jax.Array) -> jax.Array:
    """Sum of `½ cᵀ M⁻¹ c` over the pieces of every tile, by elimination.

    All tiles are eliminated at once, in whole arrays: these keep their sharding, and small
    factorisations one by one would be slow.
    """
    size = coordinates.shape[-1]
    # a block is positive definite, up to rounding
    least = jnp.finfo(matrices.dtype).eps * jnp.diagonal(matrices, axis1=-2, axis2=-1)

    def eliminate(k, carry):
        total, c, matrix = carry
        column = jax.lax.dynamic_index_in_dim(matrix, k, axis=-1, keepdims=False)
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=k, axis=-1, keepdims=False)
        pivot, own = jnp.maximum(at(column), at(least)), at(c)
        ratio = column / pivot[..., None]
        total += own**2 / pivot
        return (
            total,
            c - ratio * own[..., None],
            matrix - ratio[..., :, None] * column[..., None, :],
        )

    carry = jnp.zeros(coordinates.shape[:-1], matrices.dtype), coordinates, matrices
    if size <= UNROLLED:
        for k in range(size):
            carry = eliminate(k, carry)
    else:
        carry = jax.lax.fori_loop(0, size, eliminate, carry)
    return jnp.sum(carry[0], axis=-1) / 2
