"""Extension of the masks at a mask update: score, mask, compensate, for one or several scores."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import movable_damping, with_damping
from fishleg_jax.pruning import update
from fishleg_jax.pruning.compensation._independent import to_zero
from fishleg_jax.pruning.gradual import choice
from fishleg_jax.pruning.gradual import shadow as _shadow
from fishleg_jax.pruning.gradual.plan import GradualPlan, StepInputs, adjustable_in
from fishleg_jax.pruning.gradual.regrowth import may_return, newton_step, predicted_falls
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.masks.groups import Groups, zeros_in
from fishleg_jax.pruning.masks.lowest import keep_highest
from fishleg_jax.pruning.scores import Saliency, scores_by
from fishleg_jax.pruning.update import MaskUpdate, Surgeon

FALLBACK = "obs"  # scores of `auto` where there are no labels to measure a loss with


class MaskSite(NamedTuple):
    """Point at which masks are extended.

    Attributes:
        plan: Choices that all steps share.
        inputs: Data of the step.
        state: State before, with the step's batch assimilated if that was due.
        groups: Leaves that are pruned, and weights that share a threshold.
        counts: Number of weights to prune below every threshold.
        share: Largest share of the pruned weights that may come back; None without regrowth.
        target: Weights where the optimiser would take them, in float32 or better.
        old: Masks before.
        shadow: Pruned weights where the optimiser would take them; None without a shadow.
    """

    plan: GradualPlan
    inputs: StepInputs
    state: GradualState
    groups: Groups
    counts: jax.Array
    share: jax.Array | None
    target: Any
    old: Any
    shadow: Any | None = None


def by_loss(plan: GradualPlan, inputs: StepInputs) -> bool:
    """Whether the measured loss decides, which takes labels and something to choose between."""
    return plan.saliency == "auto" and inputs.each is not None and plan.estimator.updates != 0


def masked_by(site: MaskSite, saliency: Saliency) -> tuple[Any, Any, jax.Array]:
    """New masks, the change of the weights, and whether all numbers are finite."""
    estimate = prepared(site.plan.estimator, site.state.estimate, site.inputs.params)
    scores, free = _scored(site, saliency, site.state.estimate, estimate)
    return _masked(site, scores, free, estimate)


def chosen_by_loss(site: MaskSite) -> choice.Choice:
    """Masks and change with the lowest loss on the step's batch; see `choice.lowest`.

    Every candidate prunes as many weights of each leaf as magnitude would, and says only which:
    the loss right after a mask update would starve layers that the training after it needs.
    """
    estimator, raw = site.plan.estimator, site.state.estimate
    scores = choice.scores_to_try(estimator, raw)
    names = list(dict.fromkeys(name for name, _ in scores))
    which = jnp.asarray([names.index(name) for name, _ in scores])
    factors = jnp.asarray([factor for _, factor in scores], jnp.float32)
    full = site.plan.compensation
    cheap = getattr(full, "cheap", full)
    quick = _numbers_of_magnitude(site)._replace(plan=site.plan._replace(compensation=cheap))

    def estimates(index):
        damped = raw
        if movable_damping(raw):
            damped = with_damping(raw, raw.damping * factors[index])
        return damped, prepared(estimator, damped, site.inputs.params)

    def attempt(index):
        # one branch for every name, whatever the damping
        branches = [lambda pair, name=name: _scored(site, name, *pair) for name in names]
        pair = estimates(index)
        scores, free = jax.lax.switch(which[index], branches, pair)
        masks, delta, sound = _masked(quick, scores, free, pair[1])
        bare = to_zero(site.target, jax.tree.map(jnp.zeros_like, delta), masks)
        deltas = jax.tree.map(lambda *x: jnp.stack(x), bare, delta)
        return choice.Attempt(masks, deltas, jnp.stack([_finite(site, scores), sound]))

    best = choice.lowest(
        attempt, len(scores), site.inputs.each, site.target, site.old, site.inputs.axis_name
    )
    if cheap is full:
        return best
    # Replace the cheap compensation of the winner by the one that was asked for.
    new = _updated(site, None, estimates(best.index // 2)[1], lambda *_: best.masks)
    use = _sound(new) & (best.index % 2 == 1)
    return best._replace(delta=optax.tree.where(use, new.delta, best.delta))


def _scored(
    site: MaskSite, saliency: Saliency, raw: Any, estimate: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Scores of all leaves, and masks of the weights that may be kept."""
    surgeon = _surgeon(site)._replace(saliency=saliency)
    scores = update.score(surgeon, estimate, site.target, site.old, unprepared=raw)
    scores, free = jax.tree.leaves(scores), jax.tree.leaves(site.old)
    if site.plan.regrow is None:
        return scores, free
    # Let weights that may come back compete with those that stay, in the same units.
    gains = _gains(site, saliency, raw, estimate)
    backs = may_return(site.groups, gains, free, site.state.pruned, site.share)
    scores = [jnp.where(m, s, gain) for m, s, gain in zip(free, scores, gains, strict=True)]
    return scores, [m | back for m, back in zip(free, backs, strict=True)]


def _gains(site: MaskSite, saliency: Saliency, raw: Any, estimate: Any) -> list[jax.Array]:
    """Scores of all leaves' pruned weights, in the units of the kept ones' scores."""
    estimator = site.plan.estimator
    found = estimator, estimate, site.inputs.params, site.inputs.curvature
    if site.shadow is not None:
        pruned = jax.tree.map(jnp.logical_not, site.old)
        ahead = _shadow.put_in(site.shadow, site.target, pruned)
    elif callable(saliency) or saliency == "magnitude":
        ahead = newton_step(*found)
    else:  # in nats like the scores
        return predicted_falls(*found)
    everywhere = jax.tree.map(jnp.ones_like, site.old)
    scores = scores_by(saliency, estimator, estimate, ahead, everywhere, unprepared=raw)
    return jax.tree.leaves(scores)


def _numbers_of_magnitude(site: MaskSite) -> MaskSite:
    """The point with a number to prune of every leaf, as many as magnitude would.

    Of a stacked leaf as many of each layer.  Where weights of several leaves live or die together
    the leaves have no numbers of their own, and the point stays as it is.
    """
    groups, estimator = site.groups, site.plan.estimator
    if groups.scope != "global" or (groups.pattern is not None and groups.pattern.couplings):
        return site
    scores = scores_by("magnitude", estimator, site.state.estimate, site.target, site.old)
    old = jax.tree.leaves(site.old)
    masks = keep_highest(groups, jax.tree.leaves(scores), old, site.counts)
    own = groups._replace(scope="layer")
    return site._replace(groups=own, counts=jnp.stack(zeros_in(own, masks)))


def _masked(
    site: MaskSite, scores: list[jax.Array], free: list[jax.Array], estimate: Any
) -> tuple[Any, Any, jax.Array]:
    # with regrowth, weights that were pruned compete as well
    kept = keep_highest(site.groups, scores, free, site.counts)
    masks = jax.tree.structure(site.old).unflatten(kept)
    finite = _finite(site, scores)
    if site.shadow is not None:
        # compensate around weights that come back as around those that were kept
        back = jax.tree.map(lambda now, before: now & ~before, masks, site.old)
        site = site._replace(
            target=_shadow.put_in(site.shadow, site.target, back),
            old=jax.tree.map(jnp.logical_or, site.old, back),
        )
    new = _updated(site, scores, estimate, lambda *_: masks)
    return new.masks, new.delta, _sound(new) & finite


def _updated(
    site: MaskSite, scores: Any, estimate: Any, choose: Callable[[Any, Any], Any]
) -> MaskUpdate:
    return update.update(
        _surgeon(site), estimate, site.target, site.old, scores, choose, site.inputs.curvature
    )


def _sound(new: MaskUpdate) -> jax.Array:
    sound = _tree.all_finite(apply_mask(new.delta, new.masks))
    if "losses" in new.info:  # refused if the check found no acceptable step
        sound &= jnp.any(jnp.isfinite(jnp.asarray(new.info["losses"])))
    return sound


def _finite(site: MaskSite, scores: list[jax.Array]) -> jax.Array:
    chosen = [i for group in site.groups.members for i in group]
    return jnp.stack([jnp.all(jnp.isfinite(scores[i])) for i in chosen]).all()


def _surgeon(site: MaskSite) -> Surgeon:
    adjustable = adjustable_in(site.state, site.inputs.params)
    return Surgeon(site.plan.estimator, site.plan.compensation, site.groups, adjustable)
