"""Training and gradual pruning with one estimate: its curvature is computed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from fishleg_jax import _text
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.gradual.checks import check_optimizer
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.training.state import NaturalState, natural_state

Prune = Callable[[InverseFisher], optax.GradientTransformationExtraArgs]


class SharedState(NamedTuple):
    """State of `fishleg_optimizer` with `prune`.

    Attributes:
        optimizer: State of the optimiser, a chain that contains the `NaturalState` with the shared
            estimate.
        pruning: State of the gradual pruning, whose field `estimate` is empty.
    """

    optimizer: Any
    pruning: GradualState

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


def shared(
    optimizer: optax.GradientTransformationExtraArgs, estimator: InverseFisher, prune: Prune
) -> optax.GradientTransformationExtraArgs:
    """Puts a gradual pruning behind an optimiser whose estimate it reads.

    Two transformations of a chain cannot see each other's state, so this is one transformation of
    both: the optimiser assimilates batches, on the weights that survive, and lends its estimate to
    the pruning for the step.

    Args:
        optimizer: Chain that contains `scale_by_inverse_fisher` of the estimator.
        estimator: The estimator.
        prune: Function of the estimator that returns the pruning.

    Raises:
        ValueError: `prune` is not a function, or does not return a gradual pruning; from `init`,
            a pruning with `regrow` and magnitude scores, which needs updates of pruned weights.
    """
    if not callable(prune):
        raise ValueError(
            "prune must be a function such as lambda shared: flj.fishleg_prune(model, schedule, "
            f"estimator=shared), got {_text.shown(prune)}"
        )
    pruning = prune(estimator)
    check_optimizer(pruning, "prune: its result")

    def init(params):
        state = pruning.init(params)
        if not isinstance(state, GradualState):
            raise ValueError(
                "prune must return fishleg_prune or gradual_prune with the estimator that it is "
                f"given, got a transformation whose state is a {type(state).__name__}"
            )
        if state.shadow is not None:
            raise ValueError(
                "prune must not combine regrow with magnitude scores, as the natural gradient does "
                'not move pruned weights: use saliency="auto" or "obs"'
            )
        return SharedState(optimizer.init(params), state._replace(estimate=()))

    def update(
        updates,
        state,
        params=None,
        *,
        batch=None,
        assimilate=None,
        hold=False,
        emit=None,
        **extra,
    ):
        # Take the optimiser's step with the surviving weights.
        moved, stepped = optimizer.update(
            updates,
            state.optimizer,
            params,
            batch=batch,
            mask=state.pruning.masks,
            assimilate=assimilate,
            hold=hold,
            emit=emit,
            **extra,
        )
        # Prune with the estimate after that step.
        natural: NaturalState = natural_state(stepped)
        lent = state.pruning._replace(estimate=natural.estimate, assimilated=natural.assimilated)
        out, pruned = pruning.update(
            moved,
            lent,
            params,
            batch=batch,
            grad=updates,
            assimilate=False,
            hold=hold,
            emit=emit,
        )
        return out, SharedState(stepped, pruned._replace(estimate=()))

    return optax.GradientTransformationExtraArgs(init, update)
