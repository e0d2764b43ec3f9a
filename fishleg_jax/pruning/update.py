"""Mask update that one-shot and gradual pruning share: score, mask, compensate."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fishleg_jax._curvature import Curvature
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.compensation._adjustable import Adjustable, compensated, movable
from fishleg_jax.pruning.compensation._independent import Compensation
from fishleg_jax.pruning.masks.group_scores import of_groups
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.scores import Saliency, scores_by


class Surgeon(NamedTuple):
    """Parts of Optimal Brain Surgeon that stay the same over all mask updates.

    Attributes:
        estimator: Estimate of the inverse Fisher.
        compensation: Change of the kept weights, one of `flj.compensation` or a function with the
            same signature.
        groups: Leaves that are pruned, and weights that share a threshold.
        adjustable: Whether a compensation may move each leaf; None for all.
        saliency: Name of the scores, or a function; `auto` stands for `obs`.
    """

    estimator: InverseFisher
    compensation: Compensation
    groups: Groups
    adjustable: Adjustable = None
    saliency: Saliency = "obs"


class MaskUpdate(NamedTuple):
    """New masks, the change of the weights that goes with them, and the compensation's numbers."""

    masks: Any
    delta: Any
    info: dict[str, Any]


def score(
    surgeon: Surgeon,
    state: Any,
    weights: Any,
    masks: Any,
    gradient: Any | None = None,
    unprepared: Any | None = None,
) -> Any:
    """Scores of the kept weights.

    Args:
        surgeon: How to prune.
        state: State of the estimator, prepared for products.
        weights: Weights to score.
        masks: Masks of the weights that are still kept.
        gradient: Gradient of the loss, for first-order scores; None for a gradient of zero.
        unprepared: State before its preparation, for the Fisher's diagonal; None if it is `state`.

    Returns:
        A pytree like the weights in float32 or better; scores of pruned weights are meaningless.
        The weights of a pattern's group share its score.
    """
    free = movable(masks, surgeon.adjustable, surgeon.groups)
    scores = scores_by(
        surgeon.saliency, surgeon.estimator, state, weights, free, gradient, unprepared
    )
    states = state, state if unprepared is None else unprepared
    return of_groups(
        surgeon.groups,
        surgeon.saliency,
        *(surgeon.estimator, states, weights, free, gradient, scores),
    )


def update(
    surgeon: Surgeon,
    state: Any,
    weights: Any,
    masks: Any,
    scores: Any,
    choose: Callable[[Any, Any], Any],
    curvature: Curvature | None,
) -> MaskUpdate:
    """Masks the weights with low scores, and compensates for them.

    Args:
        surgeon: How to prune.
        state: State of the estimator, prepared for products.
        weights: Weights before.
        masks: Masks before.
        scores: Scores of the weights.
        choose: Function `(scores, masks) -> masks` that extends masks.
        curvature: Loss on the data at hand; None without data.
    """
    new_masks = choose(scores, masks)
    delta, info = compensated(
        surgeon.compensation,
        surgeon.adjustable,
        *(weights, masks, new_masks, curvature, surgeon.estimator, state),
    )
    return MaskUpdate(new_masks, delta, info)
