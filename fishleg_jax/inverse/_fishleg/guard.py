"""Guard against divergence in learning Q: monitors the auxiliary loss and backs off.

For any Q the best rescaling at a sample u is `c = uᵀz / zᵀF_γz` with `z = Qu`, which costs nothing,
and the auxiliary loss `½ zᵀF_γz − uᵀz` is negative exactly when `c > ½`.  So:

- a loss that is positive or not finite: the coordinates return to their running average, which
  excludes such iterates, and the step is halved;
- the same loss again at that average (the curvature itself has changed, or the start was wrong):
  every unit is rescaled by its own c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Guard(NamedTuple):
    """State of the guard.

    Attributes:
        step_scale: Factor on steps, in (0, 1]; halved at every back-off.
        at_average: Whether the coordinates equal their running average: initially, and right after
            a back-off.
        back_offs: Number of times the coordinates were put back.
        skipped: Number of updates discarded because a number was not finite.
    """

    step_scale: jax.Array  # shape=(), float
    at_average: jax.Array  # shape=(), bool
    back_offs: jax.Array  # shape=(), int32
    skipped: jax.Array  # shape=(), int32


RECOVERY = 1.02  # growth of the step scale after a successful step
SMALLEST_STEP = 2.0**-10


def init(dtype: jnp.dtype) -> Guard:
    """Returns the initial guard."""
    return Guard(jnp.ones((), dtype), jnp.array(True), *jnp.zeros((2,), jnp.int32))


def has_diverged(loss: jax.Array) -> jax.Array:
    """Whether a sample of the auxiliary loss shows that Q is far too large where it matters.

    At the best scale of Q the loss is `−½ uᵀz`, and it crosses zero when Q is twice as large.  On
    a model with few weights a sample scatters by tens of per cent, which rules out a tighter bound.
    """
    return (loss > 0) | ~jnp.isfinite(loss)


def rescaling(dot_uz: jax.Array, dot_zfz: jax.Array) -> jax.Array:
    """Logarithm of a unit's `c = uᵀz / zᵀF_γz`, or zero if c is invalid."""
    usable = (dot_uz > 0) & (dot_zfz > 0) & jnp.isfinite(dot_uz) & jnp.isfinite(dot_zfz)
    return jnp.where(usable, jnp.log(jnp.where(usable, dot_uz / dot_zfz, 1.0)), 0.0)


def advance(guard: Guard, diverged: jax.Array, finite: jax.Array) -> Guard:
    """Returns the guard after a step."""
    back = diverged & ~guard.at_average
    scale = jnp.where(back, guard.step_scale / 2, jnp.minimum(guard.step_scale * RECOVERY, 1.0))
    return Guard(
        step_scale=jnp.maximum(scale, SMALLEST_STEP),
        at_average=diverged,
        back_offs=guard.back_offs + back,
        skipped=guard.skipped + ~finite,
    )
