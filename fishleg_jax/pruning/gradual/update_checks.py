"""Checks of a step's arguments, which the optimiser shares with gradual pruning."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from fishleg_jax import _labels, _text, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_targets

PRUNE_OUTSIDE = "move the pruning outside of it, and choose the leaves to prune by prunable"


def check_weights(params: Any, advice: str = PRUNE_OUTSIDE) -> None:
    """Raises a ValueError unless weights are given, unmasked and of floating-point dtypes.

    Args:
        params: Weights.
        advice: What to do about masked leaves.
    """
    if params is None:
        raise ValueError(
            "params must be passed to update, got None: tx.update(grads, state, params, batch=...)"
        )
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "params has leaves masked out by optax.masked or optax.partition, but curvature needs "
            f"all leaves: {advice}"
        )
    arrays.check_dtypes(params)  # but not whether they are finite: a step must not raise for that


def check_update(
    estimator: InverseFisher,
    model: Model | None,
    params: Any,
    batch: Any,
    assimilate: Any,
    hold: Any,
    trees: Mapping[str, Any],
    advice: str = PRUNE_OUTSIDE,
) -> bool | None:
    """Checks the arguments of `update`, of arrays only types and shapes: they may be traced.

    Args:
        estimator: Estimate of the inverse Fisher.
        model: Model of the batch's targets.
        params: Weights.
        batch: Batch, or None.
        assimilate: Whether it is assimilated.
        hold: Whether the step reads no batch.
        trees: Trees like the weights by argument name; None for those left out.
        advice: What to do about masked leaves.

    Returns:
        `assimilate` if it is known while compiling, else None.
    """
    numbers.check_flag(hold, "hold")
    check_step(assimilate, hold)
    known = bool(assimilate) if isinstance(assimilate, (bool, np.bool_)) else None
    check_weights(params, advice)
    for name, tree in trees.items():
        if tree is not None:
            _tree.check_same(params, tree, name)
    if not hold:
        check_batch(estimator, batch, known)
        check_fit(model, params, batch)
    return known


def check_fit(model: Model | None, params: Any, batch: Any, argument: str = "batch") -> None:
    """Raises a ValueError if a batch does not fit a model; a step has to survive NaN labels."""
    if batch is not None and not _labels.has_nan(batch[1]):
        check_targets(model, params, batch, argument)


def check_batch(estimator: InverseFisher, batch: Any, assimilate: Any) -> None:
    """Raises a ValueError if a batch is needed and missing."""
    if batch is None and estimator.updates != 0 and assimilate is not False:
        raise ValueError(
            "batch must be passed to update for its curvature: tx.update(grads, state, params, "
            "batch=(inputs, targets)); replace wrappers that drop extra arguments: flax's "
            "TrainState by a subclass with flj.TrainStateMixin, optax.MultiSteps by flj.MultiSteps"
        )
    if batch is not None:
        arrays.check_batch_shapes(batch, "batch")


def check_step(assimilate: Any, hold: bool) -> None:
    """Raises a ValueError for invalid or contradictory flags of a step."""
    traced = isinstance(assimilate, jax.Array) and assimilate.dtype == bool
    if not (assimilate is None or isinstance(assimilate, (bool, np.bool_)) or traced):
        raise ValueError(
            f"assimilate must be None, True, False or traced, got {_text.shown(assimilate)}"
        )
    if hold and assimilate is not None and assimilate is not False:
        raise ValueError(
            f"assimilate must be None or False if hold is True, got {_text.shown(assimilate)}"
        )
