"""One stage of a pruning: scores, masks, and what the kept weights do about it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._devices import placement
from fishleg_jax._jit import jitted
from fishleg_jax.fisher import Curvature
from fishleg_jax.inverse.base import InverseFisher, prepared
from fishleg_jax.pruning._soundness import check_curvature
from fishleg_jax.pruning.compensation._adjustable import Adjustable, compensated, movable
from fishleg_jax.pruning.compensation._independent import Compensation
from fishleg_jax.pruning.masks.build import apply_masks, extend
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.report import removed_scores
from fishleg_jax.pruning.scores import obs_saliency
from fishleg_jax.pruning.selection._border import Selection


class Plan(NamedTuple):
    """What all stages have in common; see `prune_one_shot`.

    `groups` are the leaves that are pruned, decided from the weights that came in; `measure` is
    whether to report the change of the loss where the compensation does not.
    """

    estimator: InverseFisher
    compensation: Compensation
    groups: Groups
    first_order: bool = False
    costs: Any | None = None
    measure: bool = False
    selection: Selection | None = None
    adjustable: Adjustable = None


class Point(NamedTuple):
    """How far a pruning has come.

    Attributes:
        params: the weights.
        masks: which of them survive.
        removed: for every leaf the sum of the scores of its pruned weights.
    """

    params: Any
    masks: Any
    removed: Any


class Fitted(NamedTuple):
    """A point with a sound inverse Fisher; any sparsity can be tried from here.

    Attributes:
        point: where it is fitted.
        state: the state of the plan's estimator, prepared for many products.
        curvature: the loss on the stage's data.
        scores: of the weights that survive at the point.
    """

    point: Point
    state: Any
    curvature: Curvature
    scores: Any


def begin(params: Any, masks: Any) -> Point:
    """The point before the first stage, of weights and the masks that they come with."""
    params = placement.like(apply_masks(params, masks), params)
    return Point(params, masks, jax.tree.map(lambda _: jnp.zeros(()), params))


def score(plan: Plan, point: Point, state: Any, curvature: Curvature) -> Fitted:
    """Scores the surviving weights of a point, with an inverse Fisher that was fitted there.

    Raises:
        FloatingPointError: the inverse is not finite.
        UnsoundCurvature: no prunable weight has a curvature.
    """
    check_curvature(plan.estimator, plan.groups.chosen, state, point.params, point.masks)
    state = prepared(plan.estimator, state, point.params)
    return Fitted(point, state, curvature, _scores(plan, point, state, curvature))


def choose(plan: Plan, fitted: Fitted, sparsity: float) -> Any:
    """The masks of a sparsity, by the scores at a point: of a higher sparsity a part of these."""
    return extend(plan.groups, _ranked(plan, fitted), sparsity, fitted.point.masks)


def _ranked(plan: Plan, fitted: Fitted) -> Any:
    if plan.costs is None:
        return fitted.scores
    return jax.tree.map(jnp.divide, fitted.scores, plan.costs)


def advance(plan: Plan, fitted: Fitted, sparsity: float) -> tuple[Point, dict]:
    """Prunes on to a sparsity, from a point with an inverse Fisher.

    Args:
        plan: how.
        fitted: from where.
        sparsity: the fraction of the prunable weights that is pruned afterwards.

    Returns:
        The next point, and what the compensation tells, with the sum of the scores that went for
        `predicted` where it predicts nothing itself.

    Raises:
        FloatingPointError: the new weights are not finite, or their loss is not.
    """
    point, state, curvature, scores = fitted
    masks = choose(plan, fitted, sparsity)
    if plan.selection is not None:
        masks = _selected(plan, fitted, masks)
    delta, info = compensated(
        plan.compensation, plan.adjustable,
        point.params, point.masks, masks, curvature, plan.estimator, state,
    )  # fmt: skip
    moved = jax.tree.map(lambda p, d: (p + d).astype(p.dtype), point.params, delta)
    params = placement.like(apply_masks(moved, masks), point.params)
    _require_finite(params, "the compensated weights")
    removed = removed_scores(scores, point.masks, masks)
    info = {"predicted": float(sum(jax.tree.leaves(removed)))} | info
    if plan.measure and "actual" not in info:
        ends = [_tree.widen(p) for p in (point.params, params)]
        for name, loss in (("actual", curvature.loss), ("held_out", curvature.check)):
            if loss is not None:
                before, after = map(float, map(loss, ends))
                info[name] = after - before
    changes = [info.get(name, 0.0) for name in ("actual", "held_out")]
    if not all(map(math.isfinite, changes)):
        raise FloatingPointError("the loss of the pruned weights is not finite")
    return Point(params, masks, jax.tree.map(jnp.add, point.removed, removed)), info


def _selected(plan: Plan, fitted: Fitted, masks: Any) -> Any:
    """The masks of the plan's selection, which has to prune as many weights as the scores do."""
    point, state, curvature, _ = fitted
    scores = _ranked(plan, fitted)
    chosen = plan.groups.chosen
    leaves, tree = jax.tree.flatten(scores)
    barred = [
        s if yes else jnp.full(s.shape, jnp.inf, s.dtype)
        for s, yes in zip(leaves, chosen, strict=True)
    ]
    selected = plan.selection(
        point.params, point.masks, masks, tree.unflatten(barred),
        curvature, plan.estimator, state, plan.groups.scope,
    )  # fmt: skip
    _check_selected(point.masks, masks, selected, chosen, plan.groups.scope)
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


def _scores(plan: Plan, point: Point, state: Any, curvature: Curvature) -> Any:
    """OBS scores of the surviving weights, with the gradient's part where it takes part."""
    params, masks = point.params, movable(point.masks, plan.adjustable, plan.groups)
    step = None
    if plan.first_order:
        gradient = curvature.gradient(_tree.widen(params))
        step = jitted(plan.estimator.multiply)(state, gradient, masks)
    diagonal = placement.like(jitted(plan.estimator.diagonal)(state, params, masks), params)
    # pruned weights have no curvature, and need no score
    safe = jax.tree.map(lambda q, m: jnp.where(m, q, 1), diagonal, masks)
    scores = obs_saliency(params, safe, step)
    _require_finite(scores, "the diagonal of the inverse Fisher")
    return scores


def _require_finite(tree: Any, what: str) -> None:
    for name, leaf in _tree.named_leaves(tree):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise FloatingPointError(
                f"{what} has NaN or infinite values at {name!r}; a larger damping helps"
            )
