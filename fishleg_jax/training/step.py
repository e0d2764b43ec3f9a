"""One step of the natural gradient: assimilate the batch, adapt the damping, take a direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax.inverse._assimilation import Assimilation, add, assimilate
from fishleg_jax.inverse.base import InverseFisher, with_damping
from fishleg_jax.training.damping import adapted, damping_of, started
from fishleg_jax.training.grafting import with_lengths
from fishleg_jax.training.state import NaturalState


class Plan(NamedTuple):
    """Choices that all steps share, from the arguments of `scale_by_inverse_fisher`."""

    estimator: InverseFisher
    aux_every: int | jax.Array
    damping: Any
    momentum: float | jax.Array
    max_fisher_norm: Any
    graft: optax.GradientTransformation | None


class StepInputs(NamedTuple):
    """Inputs of one step.

    Attributes:
        step: Number of the step; the first is 1.
        grads: Gradients.
        params: Parameters before the step.
        batch: Batch that the estimate assimilates; None if it reads none.
        mask: Boolean pytree, True for surviving weights; None for all.
        assimilate: Whether the batch goes into the estimate; None lets the step count decide.
        emit: False if the step will be discarded.
        hold: Whether the step reads no batch.
        own: This device's batch, and the named axis of devices or None; None without a batch.
    """

    step: jax.Array
    grads: Any
    params: Any
    batch: Any | None
    mask: Any | None
    assimilate: bool | jax.Array | None
    emit: bool | jax.Array
    hold: bool
    own: tuple[Any, Any] | None


def make_step(plan: Plan, inputs: StepInputs, state: NaturalState) -> tuple[Any, NaturalState]:
    """Direction of a step, and the state after it."""
    grads = _tree.apply_mask(_tree.widen(inputs.grads), inputs.mask)
    sound = jnp.isfinite(_tree.dot(grads, grads))
    state = state._replace(count=optax.safe_increment(state.count))
    # Assimilate the batch, and compare the last step with what was predicted for it.
    due = is_due(plan, inputs, state)
    if due is not False:
        state = _assimilated(plan, inputs, state, due)
        if state.before is not None:
            state = _adapted(plan, inputs, state, due)
    # Take the gradient into the running mean, unless it is not finite.
    share = jnp.where(sound, 1 - plan.momentum, 0.0)
    momentum = jax.tree.map(
        lambda m, g: jnp.where(sound, m + share.astype(m.dtype) * (g - m), m), state.momentum, grads
    )
    weight = state.weight + share.astype(state.weight.dtype) * (1 - state.weight)
    # Multiply by the estimate, at the damping of the step.
    estimate = state.estimate
    damping = damping_of(plan.damping, state, inputs.step)
    if plan.damping is not None:
        estimate = with_damping(estimate, damping)
    direction = plan.estimator.multiply(estimate, momentum, inputs.mask)
    # Lengths of the direction of the mean, which is the sum over its weights.  All of this is
    # scalars: a pass over the weights costs as much as a part of a gradient.
    scale = 1 / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
    squared = _tree.dot(momentum, direction)
    norm = scale * jnp.sqrt(jnp.maximum(squared, 0))
    if plan.max_fisher_norm is not None:
        most = plan.max_fisher_norm
        most = most(inputs.step) if callable(most) else most
        bound = jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))
        scale, norm = bound * scale, bound * norm
    graft, length = state.graft, state.length
    if plan.graft is not None:
        zeroed = jax.tree.map(lambda g: jnp.where(sound, g, 0), grads)
        steps, graft = plan.graft.update(zeroed, graft)
        graft = optax.tree.where(sound, graft, state.graft)
        direction = with_lengths(direction, steps)
        scale = jnp.ones_like(scale)
    # Refuse anything that is not finite: the step is 0.
    usable = sound & jnp.isfinite(squared) & jnp.isfinite(scale)
    use = usable & is_ready(plan.estimator, state)
    if state.before is not None:
        length = jnp.where(use, scale * jnp.sqrt(_tree.dot(direction, direction)), 0.0)
    direction = jax.tree.map(
        lambda d, g: jnp.where(use, scale.astype(d.dtype) * d, 0).astype(g.dtype),
        direction,
        inputs.grads,
    )
    return direction, state._replace(
        momentum=momentum,
        weight=weight,
        failures=add(state.failures, ~usable),
        damping=state.damping if damping is None else jnp.asarray(damping, state.damping.dtype),
        fisher_norm=jnp.where(use, norm, 0.0).astype(state.fisher_norm.dtype),
        length=length.astype(state.length.dtype),
        before=None if state.before is None else jax.tree.map(jnp.copy, inputs.params),
        graft=graft,
    )


def is_ready(estimator: InverseFisher, state: NaturalState) -> jax.Array:
    """Whether the estimate has seen enough batches to take a direction from."""
    if estimator.updates == 0:
        return jnp.array(True)
    ready = state.assimilated >= 1
    return ready if estimator.ready is None else ready & estimator.ready(state.estimate)


def is_due(plan: Plan, inputs: StepInputs, state: NaturalState) -> jax.Array | bool:
    """Whether the estimate assimilates the step's batch; a bool if that is known beforehand."""
    if plan.estimator.updates == 0 or inputs.assimilate is False or inputs.batch is None:
        return False
    if inputs.assimilate is True:
        return inputs.emit
    due = (inputs.step % plan.aux_every == 0) | ~is_ready(plan.estimator, state)
    due &= inputs.emit
    return due if inputs.assimilate is None else due & inputs.assimilate


def _assimilated(
    plan: Plan, inputs: StepInputs, state: NaturalState, due: jax.Array | bool
) -> NaturalState:
    """State with the batch assimilated by its estimate, if that is due."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), inputs.step)

    def run(parts):
        return assimilate(plan.estimator, parts, inputs.params, inputs.batch, key, inputs.mask)

    parts = Assimilation(state.estimate, state.assimilated, state.failures)
    # no conditional if `due` is known beforehand: XLA for the CPU runs gradients of convolutions
    # in one far slower
    parts = run(parts) if due is True else run_if(due, run, parts)
    return state._replace(**parts._asdict())


def _adapted(
    plan: Plan, inputs: StepInputs, state: NaturalState, due: jax.Array | bool
) -> NaturalState:
    """State with the adaptive damping started, or adapted by the last step, if that is due."""
    if plan.estimator.fisher_diagonal is not None:
        state = started(plan.estimator, inputs.params, state, due)
    return adapted(plan.estimator.model, *inputs.own, inputs.params, state, due)
