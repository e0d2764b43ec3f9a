"""Assimilation of batches into the estimate of the inverse Fisher, and refusal of invalid ones."""

import jax
import jax.numpy as jnp
import optax

from fishleg_jax._branch import run_if
from fishleg_jax.inverse._assimilation import Assimilation, assimilate
from fishleg_jax.pruning.compensation._adjustable import movable
from fishleg_jax.pruning.gradual.plan import (
    GradualPlan,
    StepInputs,
    adjustable_in,
    groups_in,
    request_of,
)
from fishleg_jax.pruning.gradual.state import GradualState


def assimilated(
    plan: GradualPlan, inputs: StepInputs, state: GradualState, wanted: jax.Array
) -> GradualState:
    """State with the batch assimilated by its estimate, if that is due.

    A batch that is not finite, or that would make the estimate so, is refused and counted.

    Args:
        plan: Choices that all steps share.
        inputs: Data of the step.
        state: State before.
        wanted: Whether weights are going to be scored now or soon.
    """
    estimator = plan.estimator
    if estimator.updates == 0 or inputs.assimilate is False or inputs.batch is None:
        return state
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), inputs.step)

    groups = groups_in(plan, state, inputs.params)
    free = movable(state.masks, adjustable_in(state, inputs.params), groups)
    inside, first = (None, None) if plan.renew is None else _renewal(plan, inputs, state)

    def run(parts):
        estimate, number, latest, failures = parts
        if plan.renew is not None:
            estimate = optax.tree.where(first, estimator.init(inputs.params), estimate)
            number = jnp.where(first, 0, number)
        before = Assimilation(estimate, number, failures)
        after = assimilate(estimator, before, inputs.params, inputs.batch, key, free)
        return after.estimate, after.assimilated, jnp.full_like(latest, inputs.step), after.failures

    # Decide whether the batch is due.
    if inputs.assimilate is True:
        due = inputs.emit
    else:
        regular = (inputs.step % plan.aux_every == 0) | ~is_ready(plan, state)
        due = (regular if inside is None else inside) & wanted & inputs.emit
        due &= True if inputs.assimilate is None else inputs.assimilate
    parts = state.estimate, state.assimilated, state.latest, state.failures
    # no conditional if `due` is known beforehand: XLA for the CPU runs gradients of convolutions
    # in one far slower
    parts = run(parts) if due is True else run_if(due, run, parts)
    names = "estimate", "assimilated", "latest", "failures"
    return state._replace(**dict(zip(names, parts, strict=True)))


def is_ready(plan: GradualPlan, state: GradualState) -> jax.Array:
    """Whether the estimate has seen enough batches to score with."""
    if plan.estimator.updates == 0:
        return jnp.array(True)
    ready = state.assimilated >= (1 if plan.renew is None else plan.renew)
    return ready if plan.estimator.ready is None else ready & plan.estimator.ready(state.estimate)


def _renewal(
    plan: GradualPlan, inputs: StepInputs, state: GradualState
) -> tuple[jax.Array, jax.Array]:
    """Whether a step is one of the last before masks are extended, and the first of these.

    These precede the steps that `mask_every` divides, and those at which the schedule stops rising.
    If both overlap the estimate goes on, so that it is ready for the one that comes first.
    """
    last = inputs.step + plan.renew - 1  # last step of a window that would begin here
    then = request_of(plan, groups_in(plan, state, inputs.params), last, state)
    ending = then.flat & jnp.any(then.counts > state.pruned)
    begins = (last % plan.mask_every == 0) & ~ending
    inside = (-inputs.step % plan.mask_every < plan.renew) | ending
    return inside, begins | (inputs.step > state.latest + 1)
