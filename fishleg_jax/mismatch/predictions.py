"""Predicted classes of a network, with their confidences and margins."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _labels, _text, likelihoods
from fishleg_jax._batch import BatchLike, plain, split_batch
from fishleg_jax._checks import numbers
from fishleg_jax._jit import jitted
from fishleg_jax.model import Model, predict

EXPECTED = "a function (inputs) -> logits or a pair (model or predict function, params)"


class Predictions(NamedTuple):
    """Predictions of one network, example by example.

    Attributes:
        classes: Predicted class, shape (predictions,), int.
        confidences: Probability of that class, shape (predictions,).
        margins: Logit of that class minus the next highest one, shape (predictions,), in nats.
        number: Number of classes.
    """

    classes: np.ndarray
    confidences: np.ndarray
    margins: np.ndarray
    number: int


def as_function(network: Any, argument: str) -> Callable[[BatchLike], Any]:
    """Turns a network into a function of a batch.

    Args:
        network: Function `(inputs)` or `(inputs, constants)`, or a pair of a `Model` or predict
            function and its parameters.
        argument: Name of the argument in error messages.

    Returns:
        Function `(batch) -> summary`, compiled.

    Raises:
        ValueError: Anything else.
    """
    if isinstance(network, Model):
        raise ValueError(f"{argument} must be a pair (model, params), got a Model without params")
    if isinstance(network, (tuple, list)) and len(network) == 2 and callable(_function(network[0])):
        model, params = network
        if not isinstance(model, Model):
            model = Model(model, likelihoods.categorical())
        return lambda batch: jitted(_of_model, model)(params, batch)
    if not callable(network):
        raise ValueError(f"{argument} must be {EXPECTED}, got {_text.shown(network)}")
    # compiled anew by every call: a shared cache would keep the weights that a closure holds
    return jax.jit(lambda batch: _summary(_call(network, batch, argument)))


def _function(model: Any) -> Any:
    return model.predict if isinstance(model, Model) else model


def _of_model(model: Model, params: Any, batch: BatchLike) -> tuple[jax.Array, ...]:
    return _summary(predict(model, params, batch))


def _call(network: Callable, batch: BatchLike, argument: str) -> Any:
    """Logits of a plain function, which may ignore a batch's constants."""
    inputs, _, constants = split_batch(batch)
    try:
        numbers.check_function(network, argument, 1 + len(constants), "")
    except ValueError:
        return network(inputs)
    return network(inputs, *constants)


def _summary(outputs: Any) -> tuple[jax.Array, ...]:
    """Classes, confidences, margins and whether all is finite, from logits (..., classes)."""
    logits = _labels.one_array(outputs, "a classifier", 2)
    if logits.shape[-1] < 2:
        raise ValueError(f"outputs of the network must have 2 or more classes, got {logits.shape}")
    best, values = logits.argmax(axis=-1), jax.lax.top_k(logits, 2)[0]
    confidences = jnp.exp(values[..., 0] - jax.nn.logsumexp(logits, axis=-1))
    shape = jnp.zeros(logits.shape[-1], bool)  # its length is the number of classes
    margins = values[..., 0] - values[..., 1]
    return best, confidences, margins, jnp.isfinite(logits).all(), shape


def predictions_of(network: Any, batches: Sequence[BatchLike], argument: str) -> Predictions:
    """Predicts all batches.

    Args:
        network: Network as in `as_function`.
        batches: Checked batches.
        argument: Name of the network in error messages.

    Returns:
        The predictions, those of an example's tokens one after the other.

    Raises:
        ValueError: Something other than a network, or outputs other than one array of logits.
        FloatingPointError: Outputs that are not finite.
    """
    function = as_function(network, argument)
    parts: list[tuple] = []
    for i, batch in enumerate(batches):
        inputs, _, *constants = plain(batch)
        best, confidences, margins, finite, classes = function((inputs, None, *constants))
        if not bool(finite):
            raise FloatingPointError(f"{argument} predicts NaN or infinity for batches[{i}]")
        parts.append(tuple(np.asarray(x).ravel() for x in (best, confidences, margins)))
    arrays = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Predictions(*arrays, classes.shape[0])
