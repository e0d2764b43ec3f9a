"""Damping of a step: fixed, by a schedule, or adapted to the measured curvature of the steps.

`adaptive` undoes the last step `δ = -α Q m` on every new batch that the estimate assimilates.
Along δ the loss has the curvature `c = 2 (L(w - δ) - L(w) + gᵀδ)`, and to first order the step
lowers it by `α mᵀQm`, which is known.  A step for which their ratio is r falls short of that by the
share `r / 2`: at 1 it ends at the minimum along δ, at 2 the loss is back where it was.  The ratio
takes a loss and a loss with its derivative along δ, and hardly has the noise of the batch, on which
all of them are measured.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _text, _tree
from fishleg_jax._branch import run_if
from fishleg_jax._devices import axis
from fishleg_jax.inverse.base import InverseFisher, movable_damping
from fishleg_jax.model import Model, loss
from fishleg_jax.training.state import NaturalState

START = 0.05  # damping at first, relative to the trace of a leaf's Fisher
HIGH, LOW = 2.0, 1.0  # ratio above which the damping grows, and below which it falls
GROWTH = 1.4  # of the damping at a trial
FLOOR = 0.03  # smallest damping, relative to the first: lower ones fit the noise of batches
SMALLEST, LARGEST = 1e-4, 1e9  # factor on the estimate's own damping


def damping_of(damping: Any, state: NaturalState, step: jax.Array) -> jax.Array | None:
    """Damping of a step; None where the estimate's own cannot be changed and is not to be."""
    own = getattr(state.estimate, "damping", None)
    if isinstance(damping, str):
        return own * state.factor.astype(own.dtype)
    if damping is None:
        return own
    return damping(step) if callable(damping) else damping


def started(
    estimator: InverseFisher, params: Any, state: NaturalState, due: jax.Array | bool
) -> NaturalState:
    """State whose factor makes the damping a share of the Fisher's trace, at the first batch.

    The largest eigenvalues set the scale of steps that are too bold, and the trace of a leaf's
    Fisher is of their order; its mean over leaves is geometric.
    """

    def factors(_):
        diagonal = estimator.fisher_diagonal(state.estimate, params)
        traces = jnp.stack([jnp.sum(x) for x in jax.tree.leaves(diagonal) if x.ndim > 1 or few])
        typical = jnp.exp(jnp.mean(jnp.log(jnp.maximum(traces, jnp.finfo(traces.dtype).tiny))))
        found = START * typical / state.estimate.damping
        found = jnp.where(jnp.isfinite(found) & (found > 0), found, 1.0)
        least = FLOOR * found * state.estimate.damping
        return tuple(x.astype(state.factor.dtype) for x in (found, least))

    few = all(jnp.ndim(x) < 2 for x in jax.tree.leaves(params))
    first = (state.assimilated == 1) & due
    factor, least = run_if(first, factors, (state.factor, state.least))
    return state._replace(factor=factor, least=least)


def adapted(
    model: Model,
    batch: Any,
    axis_name: Any,
    params: Any,
    state: NaturalState,
    due: jax.Array | bool,
) -> NaturalState:
    """State with the factor on the damping adapted, if a trial is due.

    Args:
        model: Model whose loss is measured.
        batch: Batch of this device.
        axis_name: Axis of devices, or None.
        params: Weights after the last step.
        state: State before the step.
        due: Whether to make a trial, if there was a step.
    """

    def trial(carry):
        factor, _ = carry
        # the model's own gradient: that of the step may be of a network in training mode
        here, before = axis.varying((params, state.before), axis_name)
        last = jax.tree.map(jnp.subtract, here, before)
        old = loss(model, before, batch)
        new, slope = jax.jvp(lambda w: loss(model, w, batch), (here,), (last,))
        old, new, slope = (x.astype(factor.dtype) for x in axis.mean((old, new, slope), axis_name))
        last = jax.tree.map(jnp.subtract, _tree.widen(params), _tree.widen(state.before))
        alpha = jnp.sqrt(_tree.dot(last, last)) / state.length
        first_order = alpha * state.fisher_norm**2
        found = 2 * (old - new + slope) / jnp.maximum(first_order, jnp.finfo(factor.dtype).tiny)
        grown = jnp.where(found > HIGH, GROWTH, jnp.where(found < LOW, 1 / GROWTH, 1.0))
        # the step went much too far, unless the batch is to blame
        beyond = jnp.where(jnp.isfinite(old), GROWTH**5, 1.0)
        grown = jnp.where(jnp.isfinite(found), grown, beyond)
        # the estimate's own damping moves as well: the floor is that of their product
        least = jnp.maximum(state.least / state.estimate.damping, SMALLEST)
        grown = jnp.clip(factor * grown, least, LARGEST).astype(factor.dtype)
        return grown, found.astype(state.ratio.dtype)

    carry, stepped = (state.factor, state.ratio), state.length > 0
    if due is True:  # no branch around the network
        factor, ratio = optax.tree.where(stepped, trial(carry), carry)
    else:
        factor, ratio = run_if(stepped & due, trial, carry)
    return state._replace(factor=factor, ratio=ratio)


def check_movable(damping: Any, estimate: Any) -> None:
    """Raises a ValueError if a damping is given to an estimate that has none of its own."""
    if damping is not None and not movable_damping(estimate):
        raise ValueError(
            "damping must be None for an estimate whose damping cannot be changed, got "
            f"{_text.shown(damping)}"
        )
