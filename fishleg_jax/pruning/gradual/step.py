"""One step of a gradual pruning: assimilate the batch, extend masks, and hold zeros."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.pruning import update
from fishleg_jax.pruning._soundness import some_curvature
from fishleg_jax.pruning.gradual.assimilation import add, assimilated, is_ready
from fishleg_jax.pruning.gradual.counting import ScheduleRequest
from fishleg_jax.pruning.gradual.plan import (
    GradualPlan,
    StepInputs,
    adjustable_in,
    groups_in,
    request_of,
)
from fishleg_jax.pruning.gradual.regrowth import more_to_come, revived, share_at
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.masks.lowest import keep_highest
from fishleg_jax.pruning.update import Surgeon


def make_step(
    plan: GradualPlan, inputs: StepInputs, state: GradualState
) -> tuple[Any, GradualState]:
    """Updates that hold pruned weights at 0.0, and the state after the step."""
    params, step = inputs.params, inputs.step
    # masks that were passed to `init` are not applied before the first step
    violations = jnp.where(state.count > 0, _violations(params, state.masks), 0)
    updates, state = (
        _wide_enough(inputs),
        state._replace(
            count=optax.safe_increment(state.count), violations=add(state.violations, violations)
        ),
    )
    # Compare the requested number of pruned weights with the current one.
    request = request_of(plan, groups_in(plan, state, params), step, state.asked)
    more = jnp.any(request.counts > state.pruned)
    due = more & ((step % plan.mask_every == 0) | request.flat) & inputs.emit
    if not inputs.hold:
        updates, state = _worked(plan, inputs, state, updates, violations, request, due)
    # a due mask update stays overdue until the masks have the requested sparsity
    short = jnp.any(request.counts > state.pruned)
    state = state._replace(
        asked=request.sparsity,
        failures=add(state.failures, jnp.isnan(request.sparsity)),
        overdue=jnp.where(short, add(state.overdue, due), 0),
    )
    held = jax.tree.map(lambda u, p, m: jnp.where(m, u, -p), updates, params, state.masks)
    return held, state


def _worked(
    plan: GradualPlan,
    inputs: StepInputs,
    state: GradualState,
    updates: Any,
    violations: jax.Array,
    request: ScheduleRequest,
    due: jax.Array,
) -> tuple[Any, GradualState]:
    """Updates, with a compensation if one is due, and the state after assimilating the batch."""
    counts = jnp.maximum(request.counts, state.pruned)  # masks never shrink
    # Assimilate the batch while weights are still to be pruned.
    share = share_at(plan.regrow, inputs.step)
    nonsense = jnp.array(False) if share is None else jnp.isnan(share)
    share = None if share is None else jnp.nan_to_num(share)
    more = jnp.any(counts > state.pruned)
    finished = request.final & ~more & ~more_to_come(plan.regrow, share)
    state = assimilated(plan, inputs, state, request.soon & ~finished)

    if callable(plan.regrow):  # masks then change at a constant sparsity, too
        regular = inputs.step % plan.mask_every == 0
        due |= regular & (share > 0) & jnp.any(state.pruned > 0) & inputs.emit
    # Extend the masks if that is due and the estimate is ready.
    due &= is_ready(plan, state)
    groups = groups_in(plan, state, inputs.params)
    due &= violations >= 0  # always true, but orders the counting before writes in place
    updates, masks, refused = run_if(
        due,
        lambda carry: _extended(plan, inputs, state, groups, counts, share, *carry[:2]),
        (updates, state.masks, jnp.array(False)),
    )
    return updates, state._replace(
        masks=masks,
        pruned=jnp.where(due & ~refused, counts, state.pruned),
        failures=add(state.failures, refused | nonsense),
    )


def _extended(
    plan: GradualPlan,
    inputs: StepInputs,
    state: GradualState,
    groups: Groups,
    counts: jax.Array,
    share: jax.Array | None,
    came: Any,
    old: Any,
) -> tuple[Any, Any, jax.Array]:
    """Updates with the compensation in them, extended masks, and whether these were refused.

    If they are refused the step is as if no mask update had been due.
    """
    estimator = plan.estimator
    surgeon = Surgeon(estimator, plan.compensation, groups, adjustable_in(state, inputs.params))
    # Move the weights where the optimiser would take them.
    updates = _tree.widen(came)
    target = jax.tree.map(jnp.add, _tree.widen(inputs.params), updates)
    target = apply_mask(target, old)
    # Score the kept weights.
    estimate = prepared(estimator, state.estimate, inputs.params)
    scores = update.score(surgeon, estimate, target, old)
    curved = jnp.array(True)
    if estimator.fisher_diagonal is not None:  # without any, scores would be magnitudes
        curved, _ = some_curvature(estimator, groups.chosen, state.estimate, inputs.params, old)
    scores, tree = jax.tree.flatten(scores)
    candidates = jax.tree.leaves(old)
    # Let weights that may come back compete with those that stay.
    if plan.regrow is not None:
        backs, gains = revived(
            *(
                estimator,
                estimate,
                inputs.params,
                inputs.curvature,
                old,
                groups,
                state.pruned,
                share,
            )
        )
        scores = [
            jnp.where(m, s, gain) for m, s, gain in zip(candidates, scores, gains, strict=True)
        ]
        candidates = [m | back for m, back in zip(candidates, backs, strict=True)]
    chosen = [i for group in groups.members for i in group]
    sound = curved & jnp.stack([jnp.all(jnp.isfinite(scores[i])) for i in chosen]).all()

    # Mask and compensate; both are refused if numbers are not finite.
    def choose(scores, _):
        return tree.unflatten(keep_highest(groups, jax.tree.leaves(scores), candidates, counts))

    new_masks, delta, info = update.update(
        surgeon, estimate, target, old, tree.unflatten(scores), choose, inputs.curvature
    )
    sound &= _tree.all_finite(apply_mask(delta, new_masks))
    if "losses" in info:  # refused if the check found no acceptable step
        sound &= jnp.any(jnp.isfinite(jnp.asarray(info["losses"])))
    masks = _tree.keep_where(sound, new_masks, old)

    def moved(u, d, p, mask):
        changed = jnp.where(sound, u.astype(d.dtype) + d, u)
        return jnp.where(mask, changed.astype(u.dtype), -p)  # weights come back at 0.0

    return jax.tree.map(moved, came, delta, inputs.params, old), masks, ~sound


def _wide_enough(inputs: StepInputs) -> Any:
    """Updates in no lower precision than the weights, to represent minus a weight exactly."""
    return jax.tree.map(
        lambda u, p: u.astype(jnp.promote_types(u.dtype, p.dtype)), inputs.updates, inputs.params
    )


def _violations(params: Any, masks: Any) -> jax.Array:
    wrong = jax.tree.map(lambda p, m: _tree.count(~m & (p != 0)), params, masks)
    return sum(jax.tree.leaves(wrong))
