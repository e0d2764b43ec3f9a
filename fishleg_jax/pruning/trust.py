"""Trust in an estimate from limited data, by comparing two halves of the data."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _curvature, _labels, _prunable, _tree
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import BatchLike, Model, check_model
from fishleg_jax.pruning.leaves import Leaves, leaves_of
from fishleg_jax.pruning.masks.build import number_to_prune
from fishleg_jax.pruning.masks.groups import Groups, first_masks, make_groups
from fishleg_jax.pruning.one_shot.prune import prune_one_shot
from fishleg_jax.pruning.one_shot.stages import Stages


class Trust(NamedTuple):
    """Agreement and inflation, as `trust` returns them.

    Attributes:
        agreement: Overlap of the sets pruned with two halves of the data, beyond that of two random
            sets: 1 for the same masks, 0 for unrelated ones.  With so few data that the damping
            decides, both halves agree on pruning by magnitude: then rely on the inflation.
        inflation: `½ δᵀFδ` of a pruning by the Fisher of the half of the data that it has not seen,
            over that by the Fisher of the half that it was fitted to; the mean of both ways. 1 if
            the data suffice; far above it if the estimate over-fits its own examples.
    """

    agreement: float
    inflation: float


def trust(
    model: Model,
    params: Any,
    estimator: InverseFisher,
    batches: Sequence[BatchLike],
    *,
    sparsity: float,
    scope: str = "global",
    prunable: _prunable.LeafSelection | Leaves = None,
    masks: Any | None = "zeros",
    key: jax.Array | None = None,
    examples_per_chunk: int | None = None,
) -> Trust:
    """Prunes with either half of the data, and measures how much the two differ.

    Describes half of the data: an estimate from all of them is somewhat more reliable.  An estimate
    that divides by a fixed number of gradients (`woodfisher`) should be given that of one half
    here.

    Args:
        model: Model.
        params: Trained weights.
        estimator: Estimate of the inverse Fisher.
        batches: Two or more batches; every other one belongs to the same half.
        sparsity: Fraction of the prunable weights to prune, a number in [0, 1).
        scope: `global`, the default, for one threshold over all prunable leaves, `layer` for one in
            each.
        prunable: Leaves that may be pruned: regular expressions over key paths, a mapping of these
            to booleans, a pytree of booleans, a predicate `(name, leaf) -> bool`, or `flj.Leaves`;
            by default all but vectors, biases, normalisations, embeddings and positions.
        masks: Weights that are already pruned, which do not count towards the agreement: `"zeros"`,
            the default, takes the zeros of prunable leaves; None starts without masks; or a pytree
            of booleans, False for pruned.
        key: Random key, the same for both halves; `jax.random.key(0)` by default.
        examples_per_chunk: Number of examples at a time in products with the Fisher; None for a
            whole batch.

    Returns:
        A `Trust` of two numbers.

    Raises:
        ValueError: Fewer than two batches, a sparsity that prunes nothing, and everything that
            `prune_one_shot` rejects.
        FloatingPointError: A pruning whose cost by the Fisher is zero or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> weights = jnp.array([[3.0, 0.1], [2.0, 0.2]])
        >>> batches = [(jax.random.normal(jax.random.key(i), (100, 2)), None) for i in range(2)]
        >>> flj.trust(model, weights, flj.inverse.diagonal(model), batches, sparsity=0.5).agreement
        1.0
    """
    if len(batches) < 2:
        raise ValueError(f"batches must contain at least two batches, got {len(batches)}")
    number_to_prune(sparsity, 1)  # rejects targets: each half would get another sparsity
    check_model(model)
    _labels.require_kind(model.likelihood, "exact")
    # Prune with each half of the batches.
    halves = batches[::2], batches[1::2]
    results = [
        prune_one_shot(
            *(model, params, estimator, half),
            sparsity=sparsity,
            stages=Stages(examples_per_chunk=examples_per_chunk),
            scope=scope,
            prunable=prunable,
            masks=masks,
            key=key,
        )
        for half in halves
    ]
    leaves = leaves_of(prunable)
    groups = make_groups(params, leaves.prunable, scope, leaves.stacked)
    # Compare the pruned sets.
    before = first_masks(params, groups, masks)
    trees = before, *(result.masks for result in results)
    agreement = _agreement(*[_masks_of(tree, groups) for tree in trees])
    curvatures = [
        _curvature.curvature(model, half, examples_per_chunk=examples_per_chunk) for half in halves
    ]
    # Compare the costs of each pruning by the Fishers of both halves.
    ratios = []
    for i, result in enumerate(results):
        delta = jax.tree.map(jnp.subtract, _tree.widen(result.params), _tree.widen(params))
        costs = [_tree.dot(delta, c.product(_tree.widen(params), delta)) for c in curvatures]
        seen, unseen = float(costs[i]), float(costs[1 - i])
        if not (math.isfinite(unseen) and 0 < seen < math.inf):
            raise FloatingPointError(
                f"pruning costs {seen} by the Fisher of one half of the batches and {unseen} by "
                "that of the other, so the two cannot be compared"
            )
        ratios.append(unseen / seen)
    return Trust(agreement, sum(ratios) / len(ratios))


def _masks_of(masks: Any, groups: Groups) -> list[jax.Array]:
    return [m for m, yes in zip(jax.tree.leaves(masks), groups.chosen, strict=True) if yes]


def _agreement(before: list[jax.Array], one: list[jax.Array], other: list[jax.Array]) -> float:
    """Agreement of two prunings beyond chance, among the weights that were free before."""
    one, other = ([b & ~m for b, m in zip(before, x, strict=True)] for x in (one, other))
    pruned, total = (sum(int(x.sum()) for x in tree) for tree in (one, before))
    if pruned == 0:
        raise ValueError("sparsity must prune at least one weight to measure an agreement")
    both = sum(int(jnp.sum(x & y)) for x, y in zip(one, other, strict=True))
    by_chance = pruned**2 / total
    return (both - by_chance) / (pruned - by_chance)
