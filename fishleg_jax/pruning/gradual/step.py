"""One step of a gradual pruning: assimilate the batch, extend masks, and hold zeros."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._assimilation import add
from fishleg_jax.pruning._soundness import some_curvature
from fishleg_jax.pruning.gradual import shadow as _shadow
from fishleg_jax.pruning.gradual.assimilation import assimilated, is_ready
from fishleg_jax.pruning.gradual.choice import candidates
from fishleg_jax.pruning.gradual.counting import ScheduleRequest
from fishleg_jax.pruning.gradual.extension import (
    FALLBACK,
    MaskSite,
    by_loss,
    chosen_by_loss,
    masked_by,
)
from fishleg_jax.pruning.gradual.plan import (
    GradualPlan,
    StepInputs,
    groups_in,
    request_of,
)
from fishleg_jax.pruning.gradual.regrowth import more_to_come, share_at
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.masks.groups import Groups


def make_step(
    plan: GradualPlan, inputs: StepInputs, state: GradualState
) -> tuple[Any, GradualState]:
    """Updates that hold pruned weights at 0.0, and the state after the step."""
    params, step = inputs.params, inputs.step
    # masks that were passed to `init` are not applied before the first step
    violations = jnp.where(state.count > 0, _violations(params, state.masks), 0)
    came, old = _wide_enough(inputs), state.masks
    state = state._replace(
        count=optax.safe_increment(state.count), violations=add(state.violations, violations)
    )
    # Move the shadows of pruned weights by the updates that these do not get.
    ahead = None if state.shadow is None else _shadow.moved(state.shadow, came)
    # Compare the requested number of pruned weights with the current one.
    request = request_of(plan, groups_in(plan, state, params), step, state)
    more = jnp.any(request.counts > state.pruned)
    due = more & ((step % plan.mask_every == 0) | request.flat) & inputs.emit
    updates = came
    if not inputs.hold:
        updates, state = _worked(plan, inputs, state, came, ahead, violations, request, due)
    # a due mask update stays overdue until the masks have the requested sparsity
    short = jnp.any(request.counts > state.pruned)
    state = state._replace(
        asked=request.sparsity,
        failures=add(state.failures, jnp.isnan(request.sparsity)),
        overdue=jnp.where(short, add(state.overdue, due), 0),
    )
    if ahead is not None:
        state = state._replace(shadow=_shadow.after(ahead, params, came, old, state.masks))
    held = jax.tree.map(lambda u, p, m: jnp.where(m, u, -p), updates, params, state.masks)
    return held, state


def _worked(
    plan: GradualPlan,
    inputs: StepInputs,
    state: GradualState,
    updates: Any,
    ahead: Any | None,
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
    updates, masks, refused, won = run_if(
        due,
        lambda carry: _extended(plan, inputs, state, ahead, groups, counts, share, *carry[:2]),
        (updates, state.masks, jnp.array(False), state.chosen),
    )
    return updates, state._replace(
        masks=masks,
        chosen=won,
        pruned=jnp.where(due & ~refused, counts, state.pruned),
        failures=add(state.failures, refused | nonsense),
    )


def _extended(
    plan: GradualPlan,
    inputs: StepInputs,
    state: GradualState,
    ahead: Any | None,
    groups: Groups,
    counts: jax.Array,
    share: jax.Array | None,
    came: Any,
    old: Any,
) -> tuple[Any, Any, jax.Array, dict[str, jax.Array] | None]:
    """Updates with the compensation in them, extended masks, whether refused, and the winners.

    If the masks are refused the step is as if no mask update had been due.
    """
    # Move the weights where the optimiser would take them.
    target = jax.tree.map(jnp.add, _tree.widen(inputs.params), _tree.widen(came))
    target = apply_mask(target, old)
    curved = jnp.array(True)
    if plan.estimator.fisher_diagonal is not None:  # without any, scores would be magnitudes
        curved, _ = some_curvature(
            plan.estimator, groups.chosen, state.estimate, inputs.params, old
        )
    # Score, mask and compensate, by the scores asked for or by those with the lowest loss.
    site = MaskSite(plan, inputs, state, groups, counts, share, target, old, ahead)
    won = state.chosen
    if by_loss(plan, inputs):
        choice = chosen_by_loss(site)
        new_masks, delta, sound = choice.masks, choice.delta, curved & choice.sound
        won = {
            str(candidate): add(state.chosen[str(candidate)], sound & (choice.index == i))
            for i, candidate in enumerate(candidates(plan.estimator, state.estimate))
        }
    else:
        name = FALLBACK if plan.saliency == "auto" else plan.saliency
        new_masks, delta, sound = masked_by(site, name)
        sound &= curved
    masks = optax.tree.where(sound, new_masks, old)

    def moved(u, d, p, mask):
        changed = jnp.where(sound, u.astype(d.dtype) + d, u)
        return jnp.where(mask, changed.astype(u.dtype), -p)  # weights come back at 0.0

    def returned(u, d, p, before, now, s):
        if s is None:
            return u
        at_shadow = (s.astype(d.dtype) + d - p).astype(u.dtype)
        return jnp.where(now & ~before, at_shadow, u)

    updates = jax.tree.map(moved, came, delta, inputs.params, old)
    if ahead is not None:  # or at their shadows
        updates = jax.tree.map(returned, updates, delta, inputs.params, old, masks, ahead)
    return updates, masks, ~sound, won


def _wide_enough(inputs: StepInputs) -> Any:
    """Updates in no lower precision than the weights, to represent minus a weight exactly."""
    return jax.tree.map(
        lambda u, p: u.astype(jnp.promote_types(u.dtype, p.dtype)), inputs.updates, inputs.params
    )


def _violations(params: Any, masks: Any) -> jax.Array:
    wrong = jax.tree.map(lambda p, m: _tree.count(~m & (p != 0)), params, masks)
    return sum(jax.tree.leaves(wrong))
