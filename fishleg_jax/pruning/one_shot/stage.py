"""One stage of a one-shot pruning: scores at a point, and the step from there to a sparsity."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._checks.numbers import takes_keyword
from fishleg_jax._curvature import Curvature
from fishleg_jax._devices import placement
from fishleg_jax._jit import jitted
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.pruning import update
from fishleg_jax.pruning._soundness import check_curvature
from fishleg_jax.pruning.masks.build import extend
from fishleg_jax.pruning.masks.groups import zeros_in
from fishleg_jax.pruning.report import removed_scores
from fishleg_jax.pruning.scores import Saliency
from fishleg_jax.pruning.selection._border import Selection
from fishleg_jax.pruning.update import Surgeon


class Plan(NamedTuple):
    """Choices that all stages share.

    Attributes:
        surgeon: Estimator, compensation, and the leaves that are pruned.
        costs: Cost of each weight, which divides its score; None for equal costs.
        selection: Refinement of the masks; None for the score-based masks.
        measure: Whether to report the change of the loss if the compensation does not.
        wanted: Masks to end at, if they are given; None to choose by the scores.
    """

    surgeon: Surgeon
    costs: Any | None = None
    selection: Selection | None = None
    measure: bool = False
    wanted: Any | None = None

    @property
    def first_order(self) -> bool:
        """Whether scores, selection and compensation take the gradient into account."""
        return getattr(self.surgeon.compensation, "first_order", False)


class Point(NamedTuple):
    """Weights and masks between two stages.

    Attributes:
        params: Weights.
        masks: Masks of the weights, False for pruned.
        removed: Sum of the scores of the pruned weights, for every leaf.
    """

    params: Any
    masks: Any
    removed: Any


class Scored(NamedTuple):
    """Point with an inverse Fisher and scores; any sparsity can be tried from here.

    Attributes:
        point: Weights and masks at which the inverse Fisher was fitted.
        state: State of the estimator, prepared for many products.
        curvature: Loss on the stage's data.
        scores: Scores of the weights that are kept at the point.
        fitted: State of the estimator before it was prepared.
        choice: Name of the scores and the losses of those that were tried; None if they were given.
    """

    point: Point
    state: Any
    curvature: Curvature
    scores: Any
    fitted: Any = None
    choice: dict[str, Any] | None = None


class Step(NamedTuple):
    """End of a stage.

    Attributes:
        point: The next point; the one before if nothing was pruned.
        report: Numbers of the stage, with its `sparsity`; None if nothing was pruned.
        last: Whether the pruning ends here.
        stopped: Reason of an end that was not requested; None otherwise.
    """

    point: Point
    report: dict[str, Any] | None
    last: bool = False
    stopped: str | None = None


# (scored point, reports of earlier stages) -> end of a stage
Goal = Callable[[Scored, Sequence[dict]], Step]


def begin(params: Any, masks: Any) -> Point:
    """Point before the first stage, from weights and their initial masks."""
    kept, removed = jitted(_begun)(params, masks)
    return Point(placement.like(kept, params), masks, removed)


def _begun(params: Any, masks: Any) -> tuple[Any, Any]:
    return apply_mask(params, masks), jax.tree.map(lambda _: jnp.zeros(()), params)


def score(plan: Plan, point: Point, state: Any, curvature: Curvature) -> Scored:
    """Scores the kept weights of a point, with an inverse Fisher that was fitted there.

    Raises:
        FloatingPointError: The inverse is not finite.
        UnsoundCurvature: No prunable weight has a curvature.
    """
    surgeon = plan.surgeon
    check_curvature(surgeon.estimator, surgeon.groups.chosen, state, point.params, point.masks)
    scored = Scored(point, None, curvature, None, state)
    return rescored(plan, scored, surgeon.saliency, state)


def rescored(plan: Plan, scored: Scored, saliency: Saliency, fitted: Any) -> Scored:
    """The same point with other scores, or with a state at another damping."""
    surgeon, point = plan.surgeon._replace(saliency=saliency), scored.point
    gradient = None
    if plan.first_order:
        gradient = scored.curvature.gradient(_tree.widen(point.params))
    state = scored.state
    if state is None or fitted is not scored.fitted:
        state = prepared(surgeon.estimator, fitted, point.params)
    scores = update.score(surgeon, state, point.params, point.masks, gradient, fitted)
    scores = placement.like(scores, point.params)
    _require_finite(scores, "the diagonal of the inverse Fisher, or the scores from it,")
    return scored._replace(state=state, scores=scores, fitted=fitted)


def choose(plan: Plan, scored: Scored, sparsity: float) -> Any:
    """Masks of a sparsity, by the scores at a point; those of a higher sparsity keep a subset."""
    # the groups of a pattern have costs of their own: the sums of those of their weights
    costs = None if plan.surgeon.groups.pattern is None else plan.costs
    return extend(plan.surgeon.groups, _ranked(plan, scored), sparsity, scored.point.masks, costs)


def _ranked(plan: Plan, scored: Scored) -> Any:
    scores = scored.scores
    if plan.costs is not None and plan.surgeon.groups.pattern is None:
        scores = jax.tree.map(jnp.divide, scores, plan.costs)
    if plan.wanted is not None:  # all else goes last
        scores = jax.tree.map(lambda s, m: jnp.where(m, jnp.inf, s), scores, plan.wanted)
    return scores


def advance(plan: Plan, scored: Scored, sparsity: float) -> tuple[Point, dict]:
    """Prunes from a point with an inverse Fisher to a sparsity.

    Args:
        plan: Choices that all stages share.
        scored: Point to start from.
        sparsity: Fraction of the prunable weights that is pruned afterwards.

    Returns:
        The next point, and the numbers that the compensation reports.  `predicted` is the sum of
        the scores of the pruned weights if the compensation predicts nothing itself; `sparsity` is
        the one reached, with a pattern.

    Raises:
        FloatingPointError: The new weights or their loss are not finite.
    """
    point, state, curvature, scores = scored[:4]

    # Mask by the scores, and compensate.
    def masks_of(_, old):
        masks = choose(plan, scored, sparsity)
        return masks if plan.selection is None else _selected(plan, scored, old, masks)

    masks, delta, info = update.update(
        plan.surgeon, state, point.params, point.masks, scores, masks_of, curvature
    )
    params = placement.like(jitted(_moved)(point.params, delta, masks), point.params)
    _require_finite(params, "the compensated weights")

    # Report the predicted and, if wanted, the measured change of the loss.
    predicted, removed = jitted(_removed)(scores, point.masks, masks, point.removed)
    info = {"predicted": float(predicted)} | (scored.choice or {}) | info
    groups = plan.surgeon.groups
    if groups.pattern is not None:  # whole groups reach less than is asked for
        pruned = sum(map(int, jax.device_get(zeros_in(groups, masks))))
        info["sparsity"] = pruned / groups.weights
    if plan.measure and "actual" not in info:
        info |= _measured(curvature, point.params, params)
    changes = [info.get(name, 0.0) for name in ("actual", "held_out")]
    if not all(map(math.isfinite, changes)):
        raise FloatingPointError("the loss of the pruned weights is not finite")
    return Point(params, masks, removed), info


def _moved(params: Any, delta: Any, masks: Any) -> Any:
    """Weights after a change, of the dtypes they had, with exact zeros where masks prune."""
    moved = jax.tree.map(lambda p, d: (p + d).astype(p.dtype), params, delta)
    return apply_mask(moved, masks)


def _removed(scores: Any, old: Any, new: Any, before: Any) -> tuple[jax.Array, Any]:
    """Sum of the scores of the newly pruned weights, and its parts added to those before."""
    removed = removed_scores(scores, old, new)
    return sum(jax.tree.leaves(removed)), jax.tree.map(jnp.add, before, removed)


def _measured(curvature: Curvature, before: Any, after: Any) -> dict[str, float]:
    """Changes of the loss between two sets of weights, in nats per example."""
    ends = [_tree.widen(p) for p in (before, after)]
    losses = {"actual": curvature.loss, "held_out": curvature.check}
    changes = {}
    for name, loss in losses.items():
        if loss is not None:
            first, last = map(float, map(loss, ends))
            changes[name] = last - first
    return changes


def _selected(plan: Plan, scored: Scored, old: Any, masks: Any) -> Any:
    """Masks of the plan's selection, which has to prune as many weights as the scores do."""
    point, state, curvature = scored[:3]
    groups = plan.surgeon.groups
    leaves, tree = jax.tree.flatten(_ranked(plan, scored))
    barred = [
        s if yes else jnp.full(s.shape, jnp.inf, s.dtype)
        for s, yes in zip(leaves, groups.chosen, strict=True)
    ]
    gradient = plan.first_order and takes_keyword(plan.selection, "first_order")
    how = {"first_order": True} if gradient else {}
    selected = plan.selection(
        *(point.params, old, masks, tree.unflatten(barred)),
        *(curvature, plan.surgeon.estimator, state, groups.scope),
        **how,
    )
    _check_selected(old, masks, selected, groups.chosen, groups.scope)
    return selected


def _check_selected(old: Any, given: Any, selected: Any, chosen: list[bool], scope: str) -> None:
    _tree.check_same(given, selected, "selection")
    counts = []
    trees = map(jax.tree.leaves, (old, given, selected))
    for yes, before, expected, mask in zip(chosen, *trees, strict=True):
        if bool(jnp.any(mask & ~before)):
            raise ValueError("selection must not keep what was pruned before")
        if not yes and bool(jnp.any(mask != before)):
            raise ValueError("selection must not prune what is not prunable")
        counts.append(int(jnp.sum(mask)) - int(jnp.sum(expected)))
    if any(counts) if scope == "layer" else sum(counts):
        raise ValueError(f"selection must prune as many weights as the scores do, scope {scope!r}")


def _require_finite(tree: Any, what: str) -> None:
    finite = np.asarray(jitted(_finite)(tree))
    if not finite.all():
        name, _ = _tree.named_leaves(tree)[finite.argmin()]
        raise FloatingPointError(
            f"{what} has NaN or infinite values at {name!r}; try a larger damping"
        )


def _finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
