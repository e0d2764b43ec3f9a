"""A batch's outputs, their derivatives, and gradients and Fishers with respect to them."""

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
    """The batch with its targets drawn from the model's own distribution.

    They are the same whatever the chunk: outputs are made chunk by chunk, and drawn from at once.

    Args:
        model: the model.
        params: its parameters.
        batch: `(inputs, targets[, constants])`; the targets may be None.  A likelihood with
            `takes_targets` leaves out what these do.
        key: a random key.
        examples_per_chunk: how many examples are predicted at once; None for all of them.

    Returns:
        A batch of the same inputs and constants.
    """
    inputs, own, constants = split_batch(batch)
    outputs = _chunks.map_over_chunks(
        lambda chunk: predict(model, params, chunk), batch, examples_per_chunk
    )
    targets = _labels.sample(model.likelihood, key, jax.lax.stop_gradient(outputs), own)
    return (inputs, targets, *constants)


def linearise(model: Model, params: Params, batch: BatchLike) -> tuple[Any, Callable, Callable]:
    """Outputs of a batch, their jvp and their vjp, which share one forward pass.

    Args:
        model: the model.
        params: its parameters.
        batch: `(inputs, targets[, constants])`.

    Returns:
        The outputs, `jvp: tangent of the parameters -> tangent of the outputs`, and `vjp: cotangent
        of the outputs -> cotangent of the parameters`.
    """
    outputs, jvp = jax.linearize(lambda p: predict(model, p, batch), params)
    transpose = jax.linear_transpose(jvp, params)

    def vjp(cotangent):
        # of the outputs' dtype, which a likelihood of the user's need not keep to
        return transpose(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangent, outputs))[0]

    return outputs, jvp, vjp


def output_gradient(model: Model, outputs: Any, targets: Any, weights: jax.Array) -> Any:
    """The gradient with respect to the outputs of the losses, weighted example by example."""
    losses, pull_back = jax.vjp(lambda o: _labels.losses(model.likelihood, o, targets), outputs)
    return pull_back(placement.like(weights.astype(losses.dtype), losses))[0]


def output_fisher(model: Model, outputs: Any, targets: Any, tangent: Any, kind: str) -> Any:
    """The Fisher in output space times a tangent: exact, or of rank one for every example.

    Args:
        model: the model.
        outputs: what it predicts.
        targets: labels, the data's or sampled; `exact` does not look at them, but for what a
            likelihood with `takes_targets` leaves out by them.
        tangent: of the outputs' structure.
        kind: `exact`, `sampled` or `empirical`.
    """
    if kind == "exact":
        return _labels.fisher(model.likelihood, outputs, targets, tangent)
    # δ (δᵀ J v) with δ the gradient at the outputs, so that Jᵀ of it is g (gᵀ v)
    _, inner = jax.jvp(
        lambda o: _labels.losses(model.likelihood, o, targets), (outputs,), (tangent,)
    )
    return output_gradient(model, outputs, targets, inner)
