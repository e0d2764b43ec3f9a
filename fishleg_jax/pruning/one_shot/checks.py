"""Checks of `prune_one_shot` beyond those of weights and batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _curvature, _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import BatchLike, Model, predict, split_batch
from fishleg_jax.pruning._soundness import check_ready
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.one_shot.result import Result
from fishleg_jax.pruning.one_shot.stages import Stages
from fishleg_jax.pruning.target_types import Budget


def check_host(*given: Any) -> None:
    """Raises a ValueError under `jit` and the like, for traced arguments or traced constants."""
    if is_traced((given, jnp.negative(0.0))):
        raise ValueError(
            "params and batches must be arrays, got tracers: one-shot pruning runs on the host and "
            "compiles its parts itself; call it outside of jax.jit, grad and vmap"
        )


def check_key(key: Any) -> None:
    """Raises a ValueError for an invalid random key."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not typed and not (dtype == np.uint32 and key.ndim == 1):
        raise ValueError(
            f"key must be a random key, such as jax.random.key(0), got {_text.shown(key)}"
        )


def check_compensation(compensation: Any) -> None:
    """Raises a ValueError for anything but a compensation, such as one of `flj.compensation`."""
    expected = "one of flj.compensation, such as flj.compensation.group()"
    numbers.check_function(compensation, "compensation", 6, expected)


def check_selection(selection: Any, groups: Groups, goal: Any) -> None:
    """Raises a ValueError unless a selection is one of `flj.selection` and fits the goal."""
    if isinstance(goal, Budget):
        raise ValueError(
            f"selection must be None for a budget of {goal.unit}, because it swaps weight for "
            "weight; for a number of weights use targets.weights"
        )
    if groups.pattern is not None or groups.scope not in ("global", "layer"):
        raise ValueError(
            "selection must be None with a pattern, and with a scope other than global or layer, "
            "because it swaps single weights"
        )
    expected = "one of flj.selection, such as flj.selection.swaps()"
    numbers.check_function(selection, "selection", 8, expected)
    if groups.scope == "layer" and any(groups.stacked):
        raise ValueError(
            "selection must be None for stacked leaves with scope='layer', because it swaps "
            "weights between layers; use scope='global' or remove stacked"
        )


def check_functions(**functions: Any) -> None:
    """Raises a ValueError for a callback that can't be called with its arguments."""
    arguments = {
        "recalibrate": ("params", "batches"),
        "on_update": ("done", "total", "state"),
        "on_stage": ("result",),
    }
    for name, function in functions.items():
        if function is not None:
            expected = f"a function ({', '.join(arguments[name])}) or None"
            numbers.check_function(function, name, len(arguments[name]), expected)


def check_per_stage(value: Any, batches: int) -> int:
    """Number of batches of a stage, or a ValueError."""
    if value is None:
        return batches
    if not numbers.is_whole(value, 1) or value > batches:
        raise ValueError(
            f"batches_per_stage must be a whole number from 1 to {batches}, the number of batches, "
            f"got {_text.shown(value)}"
        )
    return int(value)


def check_needs(
    compensation: Any,
    estimator: InverseFisher,
    model: Model,
    params: Any,
    batches: Sequence[BatchLike],
    held_out: Sequence[BatchLike] | None,
    first_order: bool,
) -> None:
    """Raises a ValueError if compensation or scores need something that is missing.

    A compensation may have a function `check(curvature, estimator, state)` that raises; it reads
    only the state's fields, shapes and dtypes.
    """
    if held_out is not None and not have_labels(held_out):
        raise ValueError("held_out must have labels to check steps on, got targets of None")
    check = getattr(compensation, "check", None)
    if check is None and not first_order:
        return
    curvature = _curvature.curvature(model, batches)
    if held_out is not None:
        curvature = curvature._replace(check=_curvature.curvature(model, held_out).loss)
    if first_order and "gradient" in curvature.missing:
        raise ValueError("batches must have labels for first_order=True, got targets of None")
    if check is not None:
        check(curvature, estimator, jax.eval_shape(estimator.init, params))


def check_state(stages: Stages, estimator: InverseFisher, params: Any) -> None:
    """Raises a ValueError for a fitted state that can't be used."""
    state = stages.state
    if state is None:
        return
    if isinstance(state, Result):
        raise ValueError("state must be the state of an estimator, got a Result: pass result.state")
    if stages.on_update is not None:
        raise ValueError(
            "on_update must be None if state is given, because nothing is fitted, got "
            f"{_text.shown(stages.on_update)}"
        )
    if stages.number > 1:
        raise ValueError(
            "state must be None for more than one stage, because each has its own fit, got "
            f"{stages.number} stages"
        )
    if not _alike(state, jax.eval_shape(estimator.init, params)):
        raise ValueError(
            "state must be a fitted state of this estimator for these params, such as "
            f"Result.state, got {type(state).__name__} of another structure or other shapes"
        )
    check_ready(estimator, state)


def _alike(state: Any, expected: Any) -> bool:
    """Whether two states have the same structure and shapes."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return all(jnp.shape(a) == b.shape for a, b in pairs)


def check_model(model: Model, params: Any, batch: BatchLike) -> None:
    """Raises if a model can't predict a batch, or predicts NaN or infinity."""
    try:
        outputs = jitted(predict, model)(params, batch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"batches[0] does not fit the model: {error}") from error
    if not bool(_tree.all_finite(outputs)):
        raise FloatingPointError("the model predicts NaN or infinity on batches[0]")


def have_labels(batches: Sequence[BatchLike]) -> bool:
    """Whether the loss can be measured on batches."""
    return all(split_batch(batch)[1] is not None for batch in batches)
