"""Per-example gradients shared by K-FAC, WoodFisher, M-FAC and the diagonal."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _labels, _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._devices import sharding
from fishleg_jax._output_space import with_sampled_targets
from fishleg_jax._tree import apply_mask
from fishleg_jax.model import Model, check_model
from fishleg_jax.per_example import check_gradients, per_example_gradients

LABELS = ("empirical", "sampled")


class Rows(NamedTuple):
    """Gradients of a batch, stacked.

    Attributes:
        leaves: Gradient leaves in float32 or better, with a leading axis of gradients; zero outside
            the mask and for gradients that are not finite.
        finite: Whether each gradient is finite, of shape (gradients,).
    """

    leaves: list[jax.Array]
    finite: jax.Array


def gradient_rows(
    model: Model, labels: str, examples_per_gradient: int, examples_per_chunk: int | None
) -> Callable[..., Rows]:
    """Validates the settings and returns a function that computes the gradients of a batch.

    Args:
        model: Model to differentiate.
        labels: Source of the labels: `empirical` for the batch's own targets, `sampled` for labels
            drawn from the model.
        examples_per_gradient: Number of examples averaged into one gradient.
        examples_per_chunk: Maximum number of examples processed at a time; None for the whole
            batch.

    Returns:
        Function `(params, batch, key, mask) -> Rows`.

    Raises:
        ValueError: An argument out of range.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {_text.shown(labels)}")
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
        # zero pruned weights, and gradients with any number that is not finite
        leaves = jax.tree.leaves(apply_mask(gradients, mask))
        if mask is not None:
            leaves = [sharding.cut_gradients(x) for x in leaves]
        # no reshape here: it would gather sharded gradients
        finite = [jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in leaves]
        finite = jnp.stack(finite).all(axis=0)
        keep = lambda x: jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0)  # noqa: E731
        return Rows([keep(x) for x in leaves], finite)

    return rows


def sum_over_rows(
    model: Model, labels: str, examples_per_gradient: int, examples_per_chunk: int | None
) -> Callable[..., Any]:
    """Like `gradient_rows`, for estimators that only sum: holds the gradients of one chunk at most.

    Returns:
        Function `(params, batch, key, mask, function) -> (total, gradients, skipped)`: the sum over
        chunks of `function(Rows)`, the number of gradients, and the number of those not finite.
    """
    rows_of = gradient_rows(model, labels, examples_per_gradient, examples_per_chunk)
    labelled_rows_of = gradient_rows(model, "empirical", examples_per_gradient, examples_per_chunk)
    at_once = examples_per_chunk
    if at_once is not None:  # round down to whole gradients
        at_once = max(at_once // examples_per_gradient, 1) * examples_per_gradient

    def total(params, batch, key, mask, function):
        params, batch = sharding.anchored((params, batch))
        examples = _chunks.number_of_examples(batch)
        check_gradients(examples, examples_per_gradient)
        # draw labels for the whole batch, so that they do not depend on the chunks
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
