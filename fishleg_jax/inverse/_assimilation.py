"""One batch into an estimate while training goes on, and refusal of invalid ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._devices import axis
from fishleg_jax.inverse._fishleg.state import FishLegState
from fishleg_jax.inverse.base import InverseFisher


class Assimilation(NamedTuple):
    """An estimate that follows a training, and its counters.

    Attributes:
        estimate: State of the inverse Fisher.
        assimilated: Number of batches assimilated by the estimate.
        failures: Number of batches refused because numbers were not finite.
    """

    estimate: Any
    assimilated: jax.Array  # shape=(), int32
    failures: jax.Array  # shape=(), int32


def assimilate(
    estimator: InverseFisher,
    before: Assimilation,
    params: Any,
    batch: Any,
    key: jax.Array,
    mask: Any | None,
) -> Assimilation:
    """Assimilates a batch; one that is not finite, or makes the estimate so, is only counted.

    Args:
        estimator: Estimate of the inverse Fisher.
        before: Its state and counters before the batch.
        params: Weights.
        batch: Data.
        key: Random key.
        mask: Boolean pytree, True for surviving weights; None for all.
    """
    new = estimator.update(before.estimate, params, batch, key, mask)
    sound = axis.everywhere(_finite_numbers(batch), estimator.axis_name)
    sound &= _stays_finite(before.estimate, new)
    refused = ~sound | (_skipped(new) > _skipped(before.estimate))
    # selects of a whole state, by a condition on all of it, would take minutes to compile
    new = run_if(~sound, lambda _: before.estimate, new)
    return Assimilation(new, before.assimilated + sound, add(before.failures, refused))


def add(total: jax.Array, more: jax.Array) -> jax.Array:
    """Sum of counts that saturates at the largest number instead of wrapping round."""
    return total + jnp.minimum(more.astype(total.dtype), jnp.iinfo(total.dtype).max - total)


def _finite_numbers(tree: Any) -> jax.Array:
    inexact = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return _tree.all_finite(inexact) if inexact else jnp.array(True)


def _stays_finite(old: Any, new: Any) -> jax.Array:
    """Whether all finite entries stay finite; a fresh state may have NaNs of its own."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    kept = [
        jnp.all(jnp.isfinite(b) | ~jnp.isfinite(a))
        for a, b in pairs
        if jnp.issubdtype(a.dtype, jnp.inexact)
    ]
    return jnp.stack(kept).all() if kept else jnp.array(True)


def _skipped(estimate: Any) -> jax.Array:
    """Number of batches or gradients that an estimate reports as left out.

    Reads a field of the state itself: names further inside may be those of the user's parameters.
    """
    holder = estimate.guard if isinstance(estimate, FishLegState) else estimate
    number = getattr(holder, "skipped", None)
    counts = isinstance(number, jax.Array) and number.ndim == 0
    counts = counts and jnp.issubdtype(number.dtype, jnp.integer)
    return number if counts else jnp.zeros((), jnp.int32)
