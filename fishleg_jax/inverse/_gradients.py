"""Gradient rows: what the estimates that are no FishLeg are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _labels, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._devices import sharding
from fishleg_jax._output_space import with_sampled_targets
from fishleg_jax._tree import apply_mask
from fishleg_jax.model import Model, check_model
from fishleg_jax.per_example import check_gradients, per_example_gradients

LABELS = ("empirical", "sampled")


class Rows(NamedTuple):
    """Gradients of a batch, one after the other.

    Attributes:
        leaves: those of the parameters, in float32 or better, with a leading axis of gradients;
            zero outside the mask, and where the gradient is not finite.
        finite: which gradients are, of shape (gradients,).
    """

    leaves: list[jax.Array]
    finite: jax.Array


def gradient_rows(
    model: Model, labels: str, examples_per_gradient: int, examples_per_chunk: int | None
) -> Callable[..., Rows]:
    """Checks how gradients are to be made, and makes the function that does.

    Args:
        model: the model.
        labels: `empirical` for the batch's own targets, `sampled` for ones drawn from the model.
        examples_per_gradient: how many examples a gradient is the mean of.
        examples_per_chunk: see `per_example_gradients`.

    Returns:
        `(params, batch, key, mask) -> Rows`.

    Raises:
        ValueError: an argument out of its range.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
    check_model(model)
    if labels == "sampled":
        _labels.require(model.likelihood, ("sample",), "labels='sampled'")
    numbers.check_count(examples_per_gradient, "examples_per_gradient")
    _chunks.check_chunk(examples_per_chunk)

    def rows(params: Any, batch: Any, key: jax.Array, mask: Any | None) -> Rows:
        gradients = per_example_gradients(
            model,
            _tree.widen(params),
            batch,
            labels=labels,
            key=key,
            examples_per_gradient=examples_per_gradient,
            examples_per_chunk=examples_per_chunk,
        )
        leaves = jax.tree.leaves(apply_mask(gradients, mask))
        if mask is not None:
            leaves = [sharding.cut_gradients(x) for x in leaves]
        # without a reshape, by which what is spread over devices would be gathered
        finite = [jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in leaves]
        finite = jnp.stack(finite).all(axis=0)
        keep = lambda x: jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0)  # noqa: E731
        return Rows([keep(x) for x in leaves], finite)

    return rows


def sum_over_rows(
    model: Model, labels: str, examples_per_gradient: int, examples_per_chunk: int | None
) -> Callable[..., Any]:
    """Like `gradient_rows`, for estimates that only add up: no more gradients at once than a chunk.

    Returns:
        `(params, batch, key, mask, function) -> (total, gradients, skipped)`: the sum over chunks
        of `function(Rows)`, how many gradients there were and how many of them were not finite.
    """
    rows_of = gradient_rows(model, labels, examples_per_gradient, examples_per_chunk)
    labelled_rows_of = gradient_rows(model, "empirical", examples_per_gradient, examples_per_chunk)
    at_once = examples_per_chunk
    if at_once is not None:  # whole gradients
        at_once = max(at_once // examples_per_gradient, 1) * examples_per_gradient

    def total(params, batch, key, mask, function):
        params, batch = sharding.anchored((params, batch))
        examples = _chunks.number_of_examples(batch)
        check_gradients(examples, examples_per_gradient)
        make = rows_of
        if labels == "sampled" and not _chunks.fits(batch, at_once):
            wide = _tree.widen(params)
            batch = with_sampled_targets(model, wide, batch, key, examples_per_chunk)
            make = labelled_rows_of

        def of_chunk(chunk, chunk_key):
            rows = make(params, chunk, chunk_key, mask)
            return function(rows), _tree.count(~rows.finite)

        added, skipped = _chunks.sum_over_chunks(of_chunk, batch, key, at_once)
        return added, examples // examples_per_gradient, skipped

    return total


def check_damping(damping: float) -> None:
    """Raises a ValueError unless the damping is positive and finite."""
    numbers.check_positive(damping, "damping")
