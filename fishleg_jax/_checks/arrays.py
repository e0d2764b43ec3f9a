"""Checks of a user's arrays, on concrete values, before anything is compiled."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._batch import Batch, split_batch
from fishleg_jax._jit import is_traced


def _is_finite(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return True  # values unknown
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        return bool(_all_finite(x))  # on its devices, without gathering it
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if not jax.numpy.issubdtype(dtype, np.inexact):
        return True
    array = np.asarray(x)
    if array.dtype.itemsize < 4:
        array = array.astype(np.float32)  # NumPy's isfinite does not support bfloat16
    return bool(np.isfinite(array).all())


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jax.numpy.all(jax.numpy.isfinite(x))


def check_untraced(remedy: str, computes: str | None = None, **arguments: Any) -> None:
    """Raises a ValueError for traced arrays, whose values are unknown.

    Args:
        remedy: What to do instead, for the error message.
        computes: Name of the calling function if it needs values of arrays that it makes itself,
            as jit traces those with constants for arguments, too; None otherwise.
        **arguments: Values to check by name of the argument.
    """
    own = {computes: jax.numpy.zeros(())} if computes else {}
    for name, value in {**arguments, **own}.items():
        if is_traced(value):
            given = "called" if name == computes else "made of arrays with values"
            raise ValueError(
                f"{name} must be {given} outside of jax.jit, jax.grad and jax.vmap, got traced "
                f"arrays: {remedy}"
            )


def check_dtypes(params: Any) -> None:
    """Raises a ValueError unless there is a leaf and every leaf is a floating-point array."""
    leaves = _tree.named_leaves(params)
    if not leaves:
        raise ValueError("params has no leaves: there is nothing to prune")
    for name, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jax.numpy.issubdtype(dtype, jax.numpy.floating):
            raise ValueError(
                f"params: {name!r} must be a floating-point array, got "
                f"{dtype or type(leaf).__name__}; put arrays that are not trained in the batch's "
                "constants"
            )


def check_params(params: Any) -> None:
    """Raises a ValueError unless there is a leaf and all are finite floating-point arrays."""
    check_dtypes(params)
    for name, leaf in _tree.named_leaves(params):
        if not _is_finite(leaf):
            raise ValueError(f"params: {name!r} has NaN or infinite weights")


def check_batches(
    batches: Sequence[Any], argument: str = "batches", like: Any | None = None
) -> None:
    """Raises a ValueError unless there is a batch and all are valid and of the same signature.

    Args:
        batches: Value to check, a sequence of batches.
        argument: Name of the argument in error messages.
        like: Batch, one of `batches`, that all others must match; None for the first.
    """
    if not isinstance(batches, Sequence):
        raise ValueError(
            f"{argument} must be a sequence, such as a list, of batches, got "
            f"{type(batches).__name__}"
        )
    if isinstance(batches, tuple) and (isinstance(batches, Batch) or _looks_like_one(batches)):
        raise ValueError(
            f"{argument} must be a sequence of batches (inputs, targets[, constants]), got a "
            f"single batch: put it in a list, {argument}=[batch]"
        )
    if len(batches) == 0:
        raise ValueError(f"{argument} is empty: at least one batch is needed")
    first = batches[0] if like is None else like
    for i, batch in enumerate(batches):
        check_batch_shapes(batch, f"{argument}[{i}]")
        for name, leaf in _tree.named_leaves(tuple(batch)):
            if not _is_finite(leaf):
                raise ValueError(f"{argument}[{i}]: leaf {name!r} has NaN or infinite values")
        if _make(batch) != _make(first):
            raise ValueError(
                f"{argument}[{i}] must match batches[0] in everything but the number of examples: "
                f"expected {_make(first)}, got {_make(batch)}"
            )


def _looks_like_one(batches: tuple) -> bool:
    return bool(batches) and not isinstance(batches[0], (tuple, list))


def _make(batch: Any) -> tuple:
    """Signature shared by all batches of a model: structure, and shapes without examples."""
    inputs, targets, constants = split_batch(batch)
    shapes = [tuple(np.shape(x)[1:]) for x in jax.tree.leaves((inputs, targets))]
    shapes += [tuple(np.shape(x)) for x in jax.tree.leaves(constants)]
    return str(jax.tree.structure((inputs, targets, *constants))), shapes


def check_batch_shapes(batch: Any, argument: str) -> None:
    """Raises a ValueError unless `batch` is a batch by structure and shapes; reads no values."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            f"{argument} must be a tuple (inputs, targets) or (inputs, targets, constants), got "
            f"{type(batch).__name__}"
            + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    leaves = _tree.named_leaves(tuple(batch[:2]))
    if not jax.tree.leaves(batch[0]):
        raise ValueError(
            f"{argument} must have an array in its inputs, got {_text.shown(batch[0])}"
        )
    for name, leaf in leaves:
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"{argument}: {name!r} must have a leading axis of examples, got "
                f"{_text.shown(leaf)}"
            )
    lengths = {np.shape(leaf)[0] for _, leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(
            f"{argument}: inputs and targets must have the same number of examples, got "
            f"{sorted(lengths)}"
        )
    if lengths == {0}:
        raise ValueError(f"{argument} is empty: at least one example is needed")


def check_costs_are_numbers(costs: Any) -> None:
    """Raises a ValueError unless every leaf of `costs` is a real number or an array of them."""
    leaves = _tree.named_leaves(costs)
    if not leaves:
        raise ValueError(f"costs must be a pytree like the parameters, got {_text.shown(costs)}")
    for name, cost in leaves:
        dtype = getattr(cost, "dtype", None) or np.asarray(cost).dtype
        if not any(jax.numpy.issubdtype(dtype, x) for x in (np.floating, np.integer)):
            raise ValueError(
                f"costs: {name!r} must be a number or an array of numbers, got {_text.shown(cost)}"
            )


def check_costs(params: Any, costs: Any, chosen: Sequence[bool], *, positive: bool = True) -> None:
    """Raises a ValueError unless every prunable leaf has positive costs, one per leaf or weight.

    With `positive=False` costs may be zero.
    """
    if jax.tree.structure(params) != jax.tree.structure(costs):
        raise ValueError(
            "costs must have the structure of the parameters, but "
            f"{_tree.difference(params, costs)}"
        )
    check_costs_are_numbers(costs)
    leaves = zip(_tree.named_leaves(params), jax.tree.leaves(costs), chosen, strict=True)
    for (name, leaf), cost, prunable in leaves:
        if np.shape(cost) not in ((), np.shape(leaf)):
            raise ValueError(
                f"costs: {name!r} must be a number or have shape {np.shape(leaf)}, got "
                f"{np.shape(cost)}"
            )
        lowest = np.asarray(cost, float).min(initial=np.inf)
        if prunable and not (_is_finite(cost) and (lowest > 0 or lowest == 0 and not positive)):
            kind = "positive numbers" if positive else "numbers of at least 0"
            raise ValueError(
                f"costs: {name!r} is prunable, so its costs must be {kind}, got {lowest:g}"
            )


def check_constants(constants: Any, batch: Any) -> None:
    """Checks that constants can replace those of a batch.

    Raises:
        ValueError: Another structure or other shapes.
        FloatingPointError: Constants that are not finite.
    """
    if _make((*batch[:2], constants)) != _make(batch):
        raise ValueError(
            "recalibrate must return constants with the shapes of the batches', "
            f"{jax.tree.map(np.shape, batch[2])}, got {jax.tree.map(np.shape, constants)}"
        )
    for name, leaf in _tree.named_leaves(constants):
        if not _is_finite(leaf):
            raise FloatingPointError(f"recalibrate returned NaN or infinity at {name!r}")
