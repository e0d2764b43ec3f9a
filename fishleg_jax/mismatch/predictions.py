"""Predicted classes of a network, with their confidences and margins."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _labels, _text
from fishleg_jax._batch import BatchLike, plain, split_batch
from fishleg_jax._jit import jitted
from fishleg_jax.model import Model, predict

EXPECTED = "a function (inputs) -> logits or a pair (model or predict function, params)"
VARIABLE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
POSITIONAL = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


class Predictions(NamedTuple):
    """Predictions of one network, example by example.

    Attributes:
        classes: Predicted class, shape (predictions,), int.
        confidences: Probability of that class, shape (predictions,).
        margins: Logit of that class minus the next highest one, shape (predictions,), in nats.
        finite: Whether all of its logits are finite, shape (predictions,), bool.
        batch: Number of the batch, shape (predictions,), int.
        number: Number of classes.
    """

    classes: np.ndarray
    confidences: np.ndarray
    margins: np.ndarray
    finite: np.ndarray
    batch: np.ndarray
    number: int

    def at(self, positions: np.ndarray, argument: str) -> "Predictions":
        """Some of the predictions; raises a FloatingPointError if one of them is not finite."""
        found = Predictions(*(x[positions] for x in self[:-1]), self.number)
        if not found.finite.all():
            i = found.batch[~found.finite][0]
            raise FloatingPointError(f"{argument} predicts NaN or infinity for batches[{i}]")
        return found


def check_network(network: Any, batches: Sequence[BatchLike], argument: str) -> None:
    """Checks a network, and that a function can be called with the arguments of batches.

    Args:
        network: Function `(inputs)` or `(inputs, constants)`, or a pair of a `Model` or predict
            function and its parameters.
        batches: Checked batches.
        argument: Name of the network in error messages.

    Raises:
        ValueError: Anything else, or a function with other arguments.
    """
    if isinstance(network, Model):
        raise ValueError(f"{argument} must be a pair (model, params), got a Model without params")
    function, params = _parts(network)
    if not callable(function) and not isinstance(function, Model):
        raise ValueError(f"{argument} must be {EXPECTED}, got {_text.shown(network)}")
    taken = None if isinstance(function, Model) else _signature(function)
    if taken is None:
        return
    for i, batch in enumerate(batches):
        places, keywords = _arguments(function, params, batch)
        try:
            taken.bind(*places, **keywords)
        except TypeError as error:
            first = "params, inputs" if params else "inputs"
            has = "constants" if split_batch(batch)[2] else "no constants"
            raise ValueError(
                f"{argument} must be a function ({first}) or ({first}, constants), got one of "
                f"{taken}, and batches[{i}] has {has}: {error}"
            ) from error


def padding_of(network: Any) -> int | None:
    """Label of padding that the likelihood of a checked network's model declares, if any."""
    function, _ = _parts(network)
    return function.likelihood.ignore if isinstance(function, Model) else None


def _parts(network: Any) -> tuple[Any, tuple]:
    """The model or function of a network, and its parameters, if it has any."""
    if isinstance(network, (tuple, list)) and len(network) == 2:
        return network[0], (network[1],)
    return network, ()


def _as_function(network: Any) -> Callable[[BatchLike], Any]:
    """Turns a checked network into a compiled function of a batch."""
    function, params = _parts(network)
    if params:
        summary = _of_model if isinstance(function, Model) else _of_function
        return lambda batch: jitted(summary, function)(batch, *params)
    # compiled anew by every call: a shared cache would keep the weights that a closure holds
    return jax.jit(lambda batch: _of_function(function, batch))


def _of_model(model: Model, batch: BatchLike, params: Any) -> tuple[jax.Array, ...]:
    return _summary(predict(model, params, batch))


def _of_function(function: Callable, batch: BatchLike, *params: Any) -> tuple[jax.Array, ...]:
    places, keywords = _arguments(function, params, batch)
    return _summary(function(*places, **keywords))


def _arguments(function: Callable, params: tuple, batch: BatchLike) -> tuple[tuple, dict]:
    """Arguments of a function for a batch: the constants only if it has a parameter for them.

    Any other parameter with a default, such as `train=False`, is an option of the network.
    """
    inputs, _, constants = split_batch(batch)
    places, taken = (*params, inputs), _signature(function)
    if not constants or taken is None:
        return places, {}
    parameters = taken.parameters.values()
    following = [p for p in parameters if p.kind in POSITIONAL][len(places) :][:1]
    if any(p.default is p.empty or _for_constants(p) for p in following):
        return (*places, *constants), {}
    if any(p.kind is p.VAR_POSITIONAL and p.name == "constants" for p in parameters):
        return (*places, *constants), {}
    if any(p.kind not in VARIABLE and _for_constants(p) for p in parameters):
        return places, {"constants": constants[0]}
    return places, {}


def _for_constants(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is named `constants` and has no value of its own."""
    unset = parameter.default is parameter.empty or parameter.default is None
    return parameter.name == "constants" and unset


def _signature(function: Callable) -> inspect.Signature | None:
    """Signature of a function, or of what a wrapper with any arguments wraps; None if unknown."""
    try:
        own = inspect.signature(function, follow_wrapped=False)
        named = any(p.kind not in VARIABLE for p in own.parameters.values())
        return own if named else inspect.signature(function)
    except ValueError:  # as of functions written in C
        return None


def _summary(outputs: Any) -> tuple[jax.Array, ...]:
    """Classes, confidences, margins and whether they are finite, from logits (..., classes)."""
    logits = _labels.one_array(outputs, "a classifier", 2)
    if logits.shape[-1] < 2:
        raise ValueError(f"outputs of the network must have 2 or more classes, got {logits.shape}")
    best, values = logits.argmax(axis=-1), jax.lax.top_k(logits, 2)[0]
    confidences = jnp.exp(values[..., 0] - jax.nn.logsumexp(logits, axis=-1))
    shape = jnp.zeros(logits.shape[-1], bool)  # its length is the number of classes
    margins = values[..., 0] - values[..., 1]
    return best, confidences, margins, jnp.isfinite(logits).all(axis=-1), shape


def predictions_of(network: Any, batches: Sequence[BatchLike]) -> Predictions:
    """Predicts all batches.

    Args:
        network: Network that `check_network` accepts.
        batches: Checked batches.

    Returns:
        The predictions, those of an example's tokens one after the other.

    Raises:
        ValueError: Outputs other than one array of logits.
    """
    function = _as_function(network)
    parts: list[tuple] = []
    for i, batch in enumerate(batches):
        inputs, _, *constants = plain(batch)
        *found, classes = function((inputs, None, *constants))
        arrays = [np.asarray(x).ravel() for x in found]
        parts.append((*arrays, np.full(len(arrays[0]), i)))
    return Predictions(*(np.concatenate(x) for x in zip(*parts, strict=True)), classes.shape[0])
