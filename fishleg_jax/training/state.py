"""State of the natural-gradient optimiser."""

from typing import Any, NamedTuple

import jax

from fishleg_jax import _text


class NaturalState(NamedTuple):
    """State of `scale_by_inverse_fisher` and `scale_by_fishleg`; arrays only.

    Attributes:
        count: Number of steps made.
        momentum: Running mean of the gradients, like the parameters, in float32 or better.
        weight: Sum of the weights in that mean, which corrects its start at zero.
        estimate: State of the inverse Fisher.
        key: Data of a random key, which together with `count` gives the key of every step.
        assimilated: Number of batches assimilated by the estimate.
        failures: Number of gradients, batches and directions refused because numbers were not
            finite.
        damping: Damping γ of the last step, in units of the Fisher per example; NaN before.
        fisher_norm: Length `√(mᵀ Q m)` of the last direction in the norm of the damped Fisher; 0 if
            it was refused.
        length: Its Euclidean length, measured for `adaptive` only.
        factor: Factor on the estimate's damping that `damping="adaptive"` has found; 1 otherwise.
        least: Smallest damping that `adaptive` may reach; 0 otherwise.
        ratio: Curvature of the loss along a step, over its fall to first order, at the last trial
            of `adaptive`; NaN before and without it.
        before: Parameters before the last step, for these trials; None without them.
        graft: State of the optimiser whose step lengths are grafted; empty without one.
    """

    count: jax.Array  # shape=(), int32
    momentum: Any
    weight: jax.Array  # shape=(), float
    estimate: Any
    key: jax.Array  # shape=(2,), uint32 with the default generator
    assimilated: jax.Array  # shape=(), int32
    failures: jax.Array  # shape=(), int32
    damping: jax.Array  # shape=(), float
    fisher_norm: jax.Array  # shape=(), float
    length: jax.Array  # shape=(), float
    factor: jax.Array  # shape=(), float
    least: jax.Array  # shape=(), float
    ratio: jax.Array  # shape=(), float
    before: Any | None
    graft: Any

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


def natural_state(state: Any) -> NaturalState:
    """State of the natural gradient inside that of a chain or a wrapper.

    Raises:
        ValueError: There is none, or more than one.
    """
    is_natural = lambda x: isinstance(x, NaturalState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_natural) if is_natural(x)]
    if len(found) != 1:
        raise ValueError(
            "state must contain the state of one scale_by_inverse_fisher, scale_by_fishleg or "
            f"fishleg_optimizer, found {len(found)} in {type(state).__name__}"
        )
    return found[0]
