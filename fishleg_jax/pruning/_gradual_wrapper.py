"""What stands around an optimiser: a pruning that it does not see, and mini-steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax.inverse.base import apply_mask
from fishleg_jax.pruning._gradual_state import GradualState


class PruneState(NamedTuple):
    """State of `prune`.

    Attributes:
        pruning: that of the gradual pruning.
        inner: that of the optimiser inside.
    """

    pruning: GradualState
    inner: Any


def wrap(
    inner: optax.GradientTransformation, pruning: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that sees no gradient of a pruned weight, with the pruning behind it."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return PruneState(pruning.init(params), inner.init(params))

    def update(
        updates, state, params=None, *, batch=None, grad=None, assimilate=None, emit=True, **extra
    ):
        if params is not None:
            kept = apply_mask(updates, state.pruning.masks)
            moved, inner_state = inner.update(kept, state.inner, params, **extra)
        else:
            moved, inner_state = updates, state.inner  # refused in a moment
        out, pruned = pruning.update(
            moved, state.pruning, params, batch=batch, grad=updates if grad is None else grad,
            assimilate=assimilate, emit=emit,
        )  # fmt: skip
        return out, PruneState(pruned, _cut(inner_state, pruned.masks))

    return optax.GradientTransformationExtraArgs(init, update)


def _cut(state: Any, masks: Any) -> Any:
    """A state with zeros in what it keeps of pruned weights: moments and the like.

    These are the leaves whose path ends in that of a weight, and that have its shape and are
    floating-point numbers.
    """
    by_path = jax.tree_util.tree_leaves_with_path(masks)

    def cut(path, leaf):
        for end, mask in by_path:
            same = len(end) <= len(path) and path[len(path) - len(end) :] == end
            if same and jnp.shape(leaf) == mask.shape and jnp.issubdtype(leaf.dtype, jnp.inexact):
                return jnp.where(mask, leaf, jnp.zeros_like(leaf))
        return leaf

    return jax.tree_util.tree_map_with_path(cut, state)


class MultiSteps(optax.MultiSteps):
    """`optax.MultiSteps` that has the curvature of a gradual pruning paid for once a step.

    optax calls the optimiser at every mini-step and throws all but the last away.  This one says
    which is the last, on whose batch the curvature then is assimilated.
    """

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple:
        """See `optax.MultiSteps.update`."""
        last = state.mini_step == self._every_k_schedule(state.gradient_step) - 1
        return super().update(updates, state, params, emit=last, **extra)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """A transformation that hands extra arguments on, as that of optax does not."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)
