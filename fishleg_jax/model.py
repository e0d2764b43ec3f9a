"""What is being pruned: a prediction function and a likelihood, and the loss that they make."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fishleg_jax.likelihoods import Likelihood

Params = Any
Batch = tuple  # (inputs, targets) or (inputs, targets, constants)


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


def split_batch(batch: Batch) -> tuple[Any, Any, tuple]:
    """Takes a batch apart into its inputs, its targets (or None) and a tuple of its constants."""
    inputs, *rest = batch
    return inputs, (rest[0] if rest else None), tuple(rest[1:])


def predict(model: Model, params: Params, batch: Batch) -> Any:
    """The model's outputs on a batch."""
    inputs, _, constants = split_batch(batch)
    return model.predict(params, inputs, *constants)


def losses(model: Model, params: Params, batch: Batch) -> jax.Array:
    """The negative log-likelihood of every example, summed over its outputs.

    Args:
        model: the model.
        params: its parameters, any pytree.
        batch: `(inputs, targets[, constants])`.

    Returns:
        An array of shape `(examples,)`, in nats.

    Raises:
        ValueError: the batch has no targets.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda params, x: x @ params, flj.likelihoods.categorical())
        >>> flj.losses(model, jnp.zeros((3, 2)), (jnp.ones((1, 3)), jnp.array([1]))).round(3)
        Array([0.693], dtype=float32)
    """
    targets = split_batch(batch)[1]
    if targets is None:
        raise ValueError("batch has no targets, got None: a loss needs labels")
    return model.likelihood.negative_log_likelihood(predict(model, params, batch), targets)


def loss(model: Model, params: Params, batch: Batch) -> jax.Array:
    """The mean over a batch of `losses`: a scalar, in nats per example."""
    return losses(model, params, batch).mean()
