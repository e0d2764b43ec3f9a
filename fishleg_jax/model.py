"""The model to prune: a prediction function and a likelihood, which together define the loss."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _labels, _text, _tree
from fishleg_jax._batch import Batch as Batch
from fishleg_jax._batch import BatchLike, plain, split_batch
from fishleg_jax._checks import numbers
from fishleg_jax._devices import mesh
from fishleg_jax._jit import is_traced, jitted, shapes_of, signature
from fishleg_jax.likelihoods import Likelihood

Params = Any


class _Fields(NamedTuple):
    """Fields of a `Model`, validated there."""

    predict: Callable[..., Any]
    likelihood: Likelihood


class Model(_Fields):
    """A network in evaluation mode and the distribution that its outputs parametrise.

    Both are plain functions: code that uses a model closes over it and never traces it.

    Attributes:
        predict: Function `(params, inputs) -> outputs`, or `(params, inputs, constants) -> outputs`
            when batches carry constants (batch-norm statistics and the like).  Each example must be
            predicted independently: no batch statistics, no dropout.  Outputs may have another
            dtype than the weights; the library casts them to float32 or better.
        likelihood: Distribution of the targets given the outputs, from `fishleg_jax.likelihoods`.

    Raises:
        ValueError: `predict` does not take these arguments, or `likelihood` is not a `Likelihood`.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda params, x: x @ params["kernel"], flj.likelihoods.gaussian())
        >>> model.predict({"kernel": jnp.ones((3, 1))}, jnp.ones((2, 3)))
        Array([[3.],
               [3.]], dtype=float32)
    """

    __slots__ = ()

    def __new__(cls, predict: Callable[..., Any], likelihood: Likelihood) -> "Model":
        """Returns the model, or raises a ValueError."""
        expected = "a function (params, inputs) or (params, inputs, constants)"
        if not any(_accepts(predict, arguments) for arguments in (2, 3)):
            numbers.check_function(predict, "predict", 2, expected)
        if not isinstance(likelihood, Likelihood):
            raise ValueError(f"likelihood must be {_expected_instead_of(likelihood)}")
        return super().__new__(cls, predict, likelihood)

    @classmethod
    def _make(cls, iterable):  # `_replace` goes through it
        return cls(*iterable)

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def _expected_instead_of(likelihood: Any) -> str:
    """End of the error message for an invalid likelihood, with a hint at the fix."""
    name = getattr(likelihood, "__name__", "nll")
    hint = ""
    if getattr(likelihood, "__module__", None) == Likelihood.__module__:
        hint = f"; call it: likelihoods.{name}()"
    elif callable(likelihood):
        hint = "; a negative log-likelihood goes into flj.likelihoods.Likelihood(...)"
    expected = "a fishleg_jax.likelihoods.Likelihood, such as flj.likelihoods.categorical()"
    return f"{expected}, got {_text.shown(likelihood)}{hint}"


def _accepts(function: Any, arguments: int) -> bool:
    """Whether a function accepts this number of positional arguments."""
    try:
        numbers.check_function(function, "predict", arguments, "")
    except ValueError:
        return False
    return True


def predict(model: Model, params: Params, batch: BatchLike) -> Any:
    """Model outputs on a batch, in float32 or better.

    The cast is part of the network: derivatives go through it, and code downstream need not
    handle the original dtype.

    Raises:
        ValueError: The batch has constants and `predict` does not take them, or the reverse.
    """
    inputs, _, constants = split_batch(batch)
    try:
        outputs = model.predict(params, inputs, *constants)
    except TypeError as error:
        # a decorator such as `jax.jit` passes arguments on: check the function that it wraps
        if _accepts(inspect.unwrap(model.predict), 2 + len(constants)):
            raise
        takes, has = "(params, inputs, constants)", "no constants"
        if constants:
            takes, has = "(params, inputs)", "constants"
        raise ValueError(
            f"batch has {has}, but the model's predict takes {takes}: batches must be "
            f"(inputs, targets{'' if constants else ', constants'})"
        ) from error
    return jax.tree.map(_wide, outputs)


def _wide(x: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return x
    return _tree.widen(x)


@mesh.in_mesh_of_params
def check_targets(
    model: Model | None,
    params: Params,
    batch: BatchLike,
    argument: str = "batch",
    known: dict | None = None,
    names_axes: bool = True,
) -> None:
    """Raises a ValueError if a batch's targets do not fit the model's outputs.

    Runs on the host, from shapes and target values; nothing is compiled.  Traced targets and
    targets on other hosts are left to the losses, which are NaN for invalid ones.

    Args:
        model: Model that predicts the outputs; None skips the check.
        params: Model parameters.
        batch: Batch to check; skipped if it has no targets.
        argument: Name of the batch in error messages.
        known: Cache of output shapes by batch signature, so that each is predicted once.
        names_axes: Whether the model names Explicit axes, if the arrays have any.  One that does
            not is traced without shardings.
    """
    targets = split_batch(batch)[1]
    if model is None or targets is None or is_traced(batch):
        return
    check_model(model)
    known = {} if known is None else known
    try:
        make = signature(plain(batch))
        if make not in known:
            given = params, batch
            if not names_axes and mesh.explicit_mesh(given) is not None:
                given = jax.tree.map(_bare, given)
            known[make] = _output_shapes(model, *given)
        _labels.check_values(model.likelihood, known[make], targets)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} does not fit the model: {error}") from error


def _bare(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, without its sharding."""
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def check_all_targets(
    model: Model | None, params: Params, batches: Any, argument: str, names_axes: bool = True
) -> None:
    """Runs `check_targets` on every batch of a sequence."""
    known: dict = {}
    for i, batch in enumerate(batches):
        check_targets(model, params, batch, f"{argument}[{i}]", known, names_axes)


def _output_shapes(model: Model, params: Params, batch: BatchLike) -> Any:
    """Shapes and dtypes of a model's outputs, which fit its losses; an earlier trace is reused."""
    targets = split_batch(batch)[1]
    try:
        hash(model)
        can_reuse = not is_traced(params)
    except TypeError:
        can_reuse = False
    if can_reuse:
        outputs = shapes_of(jitted(predict, model), params, batch)
        shapes_of(jitted(_labels.losses, model.likelihood), outputs, targets)
    else:
        outputs = jax.eval_shape(partial(predict, model), params, batch)
        jax.eval_shape(partial(_labels.losses, model.likelihood), outputs, targets)
    return outputs


def check_model(model: Any, argument: str = "model") -> None:
    """Raises a ValueError for anything but a `Model`."""
    if not isinstance(model, Model):
        hint = "a function: wrap it, flj.Model(predict, flj.likelihoods.categorical())"
        given = hint if callable(model) else repr(model)
        raise ValueError(f"{argument} must be a fishleg_jax.Model, got {given}")


@mesh.in_mesh_of_params
def losses(
    model: Model, params: Params, batch: BatchLike, *, examples_per_chunk: int | None = None
) -> jax.Array:
    """Negative log-likelihood of every example, summed over its outputs.

    Args:
        model: Model to evaluate.
        params: Model parameters, any pytree.
        batch: Labelled data `(inputs, targets[, constants])`.
        examples_per_chunk: Number of examples processed at a time, which bounds the memory of
            losses and of their gradients: a gradient recomputes the activations of each chunk.
            None for the whole batch.

    Returns:
        Array of shape `(examples,)`, in nats.

    Raises:
        ValueError: Missing targets, targets outside the likelihood's support (under `jit` they make
            the loss NaN), or an empty chunk.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda params, x: x @ params, flj.likelihoods.categorical())
        >>> flj.losses(model, jnp.zeros((3, 2)), (jnp.ones((1, 3)), jnp.array([1]))).round(3)
        Array([0.693], dtype=float32)
    """
    check_model(model)
    if isinstance(batch, list):
        raise ValueError("batch must be a tuple (inputs, targets[, constants]), got a list")
    if split_batch(batch)[1] is None:
        raise ValueError("batch must have labels to compute a loss, got targets of None")

    if not _chunks.fits(batch, examples_per_chunk):
        check_targets(model, params, batch)  # inside a chunk the values are traced

    def of_chunk(chunk):
        targets = split_batch(chunk)[1]
        return _labels.losses(model.likelihood, predict(model, params, chunk), targets)

    return _chunks.map_over_chunks(of_chunk, batch, examples_per_chunk)


def loss(
    model: Model, params: Params, batch: BatchLike, *, examples_per_chunk: int | None = None
) -> jax.Array:
    """Mean of `losses` over a batch: a scalar, in nats per example."""
    return losses(model, params, batch, examples_per_chunk=examples_per_chunk).mean()
