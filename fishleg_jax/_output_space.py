"""Outputs of a batch, their derivatives, and gradients and Fishers in output space."""

from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax import _chunks, _labels
from fishleg_jax._devices import placement
from fishleg_jax.model import BatchLike, Model, Params, predict, split_batch


def with_sampled_targets(
    model: Model,
    params: Params,
    batch: BatchLike,
    key: jax.Array,
    examples_per_chunk: int | None = None,
) -> BatchLike:
    """Replaces a batch's targets by samples from the model's own distribution.

    The samples do not depend on the chunks: outputs are computed by chunk, and sampled all at once.

    Args:
        model: Model to sample from.
        params: Model parameters.
        batch: Data `(inputs, targets[, constants])`; the targets may be None.  A likelihood with
            `takes_targets` excludes the outputs that they mark.
        key: Random key.
        examples_per_chunk: Number of examples predicted at a time; None for the whole batch.

    Returns:
        Batch with the same inputs and constants.
    """
    inputs, own, constants = split_batch(batch)
    outputs = _chunks.map_over_chunks(
        lambda chunk: predict(model, params, chunk), batch, examples_per_chunk
    )
    targets = _labels.sample(model.likelihood, key, jax.lax.stop_gradient(outputs), own)
    return (inputs, targets, *constants)


def linearise(model: Model, params: Params, batch: BatchLike) -> tuple[Any, Callable, Callable]:
    """Computes the outputs of a batch, their jvp and their vjp in one shared forward pass.

    Args:
        model: Model to linearise.
        params: Model parameters.
        batch: Data `(inputs, targets[, constants])`.

    Returns:
        The outputs, `jvp: tangent of the parameters -> tangent of the outputs`, and `vjp: cotangent
        of the outputs -> cotangent of the parameters`.
    """
    outputs, jvp = jax.linearize(lambda p: predict(model, p, batch), params)
    transpose = jax.linear_transpose(jvp, params)

    def vjp(cotangent):
        # cast to the outputs' dtype, which a user's likelihood may not preserve
        return transpose(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangent, outputs))[0]

    return outputs, jvp, vjp


def output_gradient(model: Model, outputs: Any, targets: Any, weights: jax.Array) -> Any:
    """Gradient of the losses with respect to the outputs, with one weight per example."""
    losses, pull_back = jax.vjp(lambda o: _labels.losses(model.likelihood, o, targets), outputs)
    return pull_back(placement.like(weights.astype(losses.dtype), losses))[0]


def output_fisher(model: Model, outputs: Any, targets: Any, tangent: Any, kind: str) -> Any:
    """Product of the output-space Fisher with a tangent: exact, or of rank one per example.

    Args:
        model: Model with the likelihood.
        outputs: Outputs of the model.
        targets: Labels, from the data or sampled; `exact` uses them only to exclude outputs, for a
            likelihood with `takes_targets`.
        tangent: Tangent with the structure of the outputs.
        kind: Which Fisher: `exact`, `sampled` or `empirical`.
    """
    if kind == "exact":
        return _labels.fisher(model.likelihood, outputs, targets, tangent)
    # δ (δᵀ J v) with δ the gradient with respect to the outputs, so that Jᵀ of it is g (gᵀ v)
    _, inner = jax.jvp(
        lambda o: _labels.losses(model.likelihood, o, targets), (outputs,), (tangent,)
    )
    return output_gradient(model, outputs, targets, inner)
