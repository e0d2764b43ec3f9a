"""What `prune_one_shot` refuses beyond unsound weights and batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Batch, Model, predict, split_batch


def check_state(state: Any | None, estimator: InverseFisher, params: Any, stages: int) -> None:
    """Raises a ValueError where a fitted state was given that can't be used."""
    if state is not None and stages > 1:
        raise ValueError(f"state is for a single stage, which needs no other fit; stages={stages}")
    if state is not None and not _alike(state, jax.eval_shape(estimator.init, params)):
        raise ValueError(
            "state must be one of this estimator for these params; it has other shapes"
        )


def _alike(state: Any, expected: Any) -> bool:
    """Whether two states have one structure and the same shapes."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return all(jnp.shape(a) == b.shape for a, b in pairs)


def check_model(model: Model, params: Any, batch: Batch) -> None:
    """Raises where a model can't predict a batch, or predicts NaN or infinity."""
    try:
        outputs = jitted(predict, model)(params, batch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"batches[0] does not fit the model: {error}") from error
    if not bool(_tree.all_finite(outputs)):
        raise FloatingPointError("the model predicts NaN or infinity on batches[0]")


def have_labels(batches: Sequence[Batch]) -> bool:
    """Whether the loss can be measured on batches."""
    return all(split_batch(batch)[1] is not None for batch in batches)
