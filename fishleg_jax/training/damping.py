"""Damping of a step: fixed, by a schedule, or adapted to the measured curvature of the steps.

`adaptive` undoes the last step δ on the new batch, every few steps.  Along δ the loss has a
curvature `c = 2 (L(w - δ) - L(w) + gᵀδ)`, for which the estimate predicts `δᵀQ⁻¹δ`; as `δ = -α Q m`
that is `α² mᵀQm`, which costs nothing.  A step costs two losses then, a third of a gradient each.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._devices import axis
from fishleg_jax.inverse.base import movable_damping
from fishleg_jax.model import Model, loss
from fishleg_jax.training.state import NaturalState

ADAPT_EVERY = 5  # steps
HIGH, LOW = 1.0, 0.5  # measured over predicted curvature at which the damping grows, or falls
GROWTH = 1.1  # of the damping at a trial
SMALLEST, LARGEST = 1e-6, 1e6  # factor on the estimate's own damping


def damping_of(damping: Any, state: NaturalState, step: jax.Array) -> jax.Array | None:
    """Damping of a step; None where the estimate's own cannot be changed and is not to be."""
    own = getattr(state.estimate, "damping", None)
    if isinstance(damping, str):
        return own * state.factor.astype(own.dtype)
    if damping is None:
        return own
    return damping(step) if callable(damping) else damping


def adapted(
    model: Model, batch: Any, axis_name: Any, grads: Any, params: Any, state: NaturalState
) -> NaturalState:
    """State with the factor on the damping adapted, if a trial is due.

    Args:
        model: Model whose loss is measured.
        batch: Batch of this device.
        axis_name: Axis of devices, or None.
        grads: Gradient on the batch, over all devices.
        params: Weights after the last step.
        state: State with the count of this step, before it.
    """
    due = (state.count % ADAPT_EVERY == 0) & (state.length > 0)

    def trial(carry):
        factor, ratio = carry
        losses = [loss(model, axis.varying(w, axis_name), batch) for w in (state.before, params)]
        old, new = (axis.mean(x, axis_name).astype(factor.dtype) for x in losses)
        last = jax.tree.map(jnp.subtract, _tree.widen(params), _tree.widen(state.before))
        measured = 2 * (old - new + _tree.dot(grads, last))
        alpha = jnp.sqrt(_tree.dot(last, last)) / state.length
        predicted = (alpha * state.fisher_norm) ** 2
        found = measured / jnp.maximum(predicted, jnp.finfo(factor.dtype).tiny)
        grown = jnp.where(found > HIGH, GROWTH, jnp.where(found < LOW, 1 / GROWTH, 1.0))
        grown = jnp.where(jnp.isfinite(found), grown, GROWTH**5)  # the step went too far
        return jnp.clip(factor * grown, SMALLEST, LARGEST).astype(factor.dtype), found

    factor, ratio = run_if(due, trial, (state.factor, state.ratio))
    return state._replace(factor=factor, ratio=ratio.astype(state.ratio.dtype))


def check_movable(damping: Any, estimate: Any) -> None:
    """Raises a ValueError if a damping is given to an estimate that has none of its own."""
    if damping is not None and not movable_damping(estimate):
        raise ValueError(
            f"damping must be None for an estimate whose damping cannot be changed, got {damping!r}"
        )
