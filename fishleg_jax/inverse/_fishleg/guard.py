"""What keeps the learning of Q from exploding: it watches the auxiliary loss and backs off.

For any Q the best rescaling at a sample u is `c = uᵀz / zᵀF_γz` with `z = Qu`, which costs nothing,
and the auxiliary loss `½ zᵀF_γz − uᵀz` is negative exactly when `c > ½`.  So:

- a loss that is positive or not finite: the coordinates go back to their running average, into
  which no such iterate was let, and the step is halved;
- the same loss again at that average (the curvature itself has changed, or the start was wrong):
  every unit is rescaled by its own c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Guard(NamedTuple):
    """The guard's memory.

    Attributes:
        step_scale: what steps are multiplied with, in (0, 1]; halved at every back-off.
        at_average: whether the coordinates are their running average: at the start, and when they
            were just put back.
        back_offs: how often they were put back.
        skipped: how many updates were thrown away because a number was not finite.
    """

    step_scale: jax.Array  # shape=(), float
    at_average: jax.Array  # shape=(), bool
    back_offs: jax.Array  # shape=(), int32
    skipped: jax.Array  # shape=(), int32


RECOVERY = 1.02  # a step that went well gives back two per cent of the step scale
SMALLEST_STEP = 2.0**-10


def init(dtype: jnp.dtype) -> Guard:
    """A guard that has seen nothing."""
    return Guard(jnp.ones((), dtype), jnp.array(True), *jnp.zeros((2,), jnp.int32))


def has_diverged(loss: jax.Array) -> jax.Array:
    """Whether a sample of the auxiliary loss says that Q is far too large where it matters.

    At the best scale of Q the loss is `−½ uᵀz`, and it passes zero where Q is twice as large.  A
    sample scatters by tens of per cent on a model of few weights, so that no nearer bound will do.
    """
    return (loss > 0) | ~jnp.isfinite(loss)


def rescaling(dot_uz: jax.Array, dot_zfz: jax.Array) -> jax.Array:
    """The logarithm of `c = uᵀz / zᵀF_γz` of a unit, and zero where c is nothing to go by."""
    usable = (dot_uz > 0) & (dot_zfz > 0) & jnp.isfinite(dot_uz) & jnp.isfinite(dot_zfz)
    return jnp.where(usable, jnp.log(jnp.where(usable, dot_uz / dot_zfz, 1.0)), 0.0)


def advance(guard: Guard, diverged: jax.Array, finite: jax.Array) -> Guard:
    """The guard after a step."""
    back = diverged & ~guard.at_average
    scale = jnp.where(back, guard.step_scale / 2, jnp.minimum(guard.step_scale * RECOVERY, 1.0))
    return Guard(
        step_scale=jnp.maximum(scale, SMALLEST_STEP),
        at_average=diverged,
        back_offs=guard.back_offs + back,
        skipped=guard.skipped + ~finite,
    )
