"""What is being pruned: a prediction function and a likelihood, and the loss that they make."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fishleg_jax import _chunks, _mesh
from fishleg_jax._chunks import Batch, split_batch
from fishleg_jax.likelihoods import Likelihood

Params = Any


class Model(NamedTuple):
    """A network in evaluation mode and the meaning of its outputs.

    Both are functions: a model is closed over by what uses it and is never traced.

    Attributes:
        predict: `(params, inputs) -> outputs`, or `(params, inputs, constants) -> outputs` when
            batches carry constants (batch-norm statistics and the like).  Every example must be
            predicted by itself: no batch statistics, no dropout.
        likelihood: what the outputs mean, see `fishleg_jax.likelihoods`.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda params, x: x @ params["kernel"], flj.likelihoods.gaussian())
        >>> model.predict({"kernel": jnp.ones((3, 1))}, jnp.ones((2, 3)))
        Array([[3.],
               [3.]], dtype=float32)
    """

    predict: Callable[..., Any]
    likelihood: Likelihood


def predict(model: Model, params: Params, batch: Batch) -> Any:
    """The model's outputs on a batch."""
    inputs, _, constants = split_batch(batch)
    return model.predict(params, inputs, *constants)


def check_model(model: Any) -> None:
    """Raises a ValueError for what is no model."""
    if not isinstance(model, Model):
        hint = "a function: wrap it, flj.Model(predict, flj.likelihoods.categorical())"
        raise ValueError(
            f"model must be a fishleg_jax.Model, got {hint if callable(model) else repr(model)}"
        )


@_mesh.in_mesh_of_params
def losses(
    model: Model, params: Params, batch: Batch, *, examples_per_chunk: int | None = None
) -> jax.Array:
    """The negative log-likelihood of every example, summed over its outputs.

    Args:
        model: the model.
        params: its parameters, any pytree.
        batch: `(inputs, targets[, constants])`.
        examples_per_chunk: bounds memory, that of a gradient too: that many examples are worked on
            at once, and a gradient makes the activations of each chunk anew.

    Returns:
        An array of shape `(examples,)`, in nats.

    Raises:
        ValueError: the batch has no targets, a chunk of no examples.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda params, x: x @ params, flj.likelihoods.categorical())
        >>> flj.losses(model, jnp.zeros((3, 2)), (jnp.ones((1, 3)), jnp.array([1]))).round(3)
        Array([0.693], dtype=float32)
    """
    if split_batch(batch)[1] is None:
        raise ValueError("batch has no targets, got None: a loss needs labels")

    def of_chunk(chunk):
        targets = split_batch(chunk)[1]
        return model.likelihood.negative_log_likelihood(predict(model, params, chunk), targets)

    return _chunks.map_over_chunks(of_chunk, batch, examples_per_chunk)


def loss(
    model: Model, params: Params, batch: Batch, *, examples_per_chunk: int | None = None
) -> jax.Array:
    """The mean over a batch of `losses`: a scalar, in nats per example."""
    return losses(model, params, batch, examples_per_chunk=examples_per_chunk).mean()
