"""Curvature of the loss on fixed batches: loss, gradient, products with the Fisher."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _text
from fishleg_jax._batch import plain
from fishleg_jax._devices import axis, mesh
from fishleg_jax._devices import placement as _placement
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._output_space import output_gradient as output_gradient
from fishleg_jax.fisher import check_kind, fisher_vector_product
from fishleg_jax.model import (
    BatchLike,
    Model,
    Params,
    check_model,
    check_targets,
    losses,
    split_batch,
)


class Curvature(NamedTuple):
    """Loss, gradient and Fisher products as functions of the parameters, on fixed data.

    Attributes:
        loss: Function `(params) -> scalar`, the mean loss in nats per example.
        gradient: Function `(params) -> tangent`, the gradient of `loss`.
        product: Function `(params, vector) -> tangent`, the undamped Fisher times a vector.
        check: Function like `loss` on held-out data, used to validate steps; None without such
            data.
        each: Function `(params) -> arrays` of the losses of all held-out examples, in nats, an
            array for each batch; None without such data.
        part: The same on a part of the data, for choices that may be rough; None for all of them.
        missing: Names of the functions that cannot be called: `loss` and `gradient` for unlabelled
            data, `product` for a likelihood without the `fisher` or `sample` it needs.
    """

    loss: Callable[[Params], jax.Array]
    gradient: Callable[[Params], Any]
    product: Callable[[Params, Params], Any]
    check: Callable[[Params], jax.Array] | None = None
    each: Callable[[Params], list[jax.Array]] | None = None
    part: "Curvature | None" = None
    missing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def curvature(
    model: Model,
    batches: Sequence[BatchLike],
    *,
    kind: str = "exact",
    key: jax.Array | None = None,
    examples_per_chunk: int | None = None,
) -> Curvature:
    """Loss, gradient and Fisher products over batches, in the activation memory of one batch.

    Args:
        model: Model to evaluate.
        batches: Sequence of batches with the same constants; sizes may differ.
        kind: Which Fisher: `exact` (default), `sampled` or `empirical`, as in
            `fisher_vector_product`.
        key: Random key, required for `sampled`; every call draws the same labels.
        examples_per_chunk: Number of examples processed at a time, which bounds the activations
            further; None for whole batches.

    Returns:
        A `Curvature`, whose functions loop over the batches, or under `jit` run a `lax.scan`.

    Raises:
        ValueError: An empty sequence, an unknown kind, a missing key or missing labels.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> one, two = jnp.array([[1.0]]), jnp.array([[2.0]])
        >>> batches = [(one, jnp.array([3.0])), (two, jnp.array([0.0]))]
        >>> flj.curvature(model, batches).product(jnp.zeros(1), jnp.ones(1))
        Array([2.5], dtype=float32)
    """
    if not batches:
        raise ValueError("batches is empty: at least one batch is needed")
    _chunks.check_chunk(examples_per_chunk)
    check_model(model)
    check_kind(kind, batches[0], key)
    key = jax.random.key(0) if key is None else key
    constants = split_batch(batches[0])[2]
    labelled = all(split_batch(batch)[1] is not None for batch in batches)
    chunk = max(_chunks.number_of_examples(b) for b in batches)
    examples = sum(_chunks.number_of_examples(b) for b in batches)

    # functions that lack labels, or the part of the likelihood they need
    missing = () if labelled else ("loss", "gradient")
    needed = {"exact": model.likelihood.fisher, "sampled": model.likelihood.sample}
    missing += ("product",) if needed.get(kind, True) is None else ()

    known: dict = {}
    unchecked = [*enumerate(batches)]

    def check_labels(params):  # once per batch: the shapes of outputs depend on the parameters
        while unchecked:
            i, batch = unchecked[0]
            check_targets(model, params, batch, f"batches[{i}]", known)
            unchecked.pop(0)

    @functools.cache
    def merged():  # lazy: many compensations never need it
        if len(batches) == 1:
            return plain(batches[0])
        with jax.ensure_compile_time_eval():
            pairs = [tuple(b[:2]) for b in batches]
            return (*jax.tree.map(lambda *xs: jnp.concatenate(xs), *pairs), *constants)

    @mesh.in_mesh_of_params
    def mean(part_sum, *arguments):
        if part_sum is not _product_sum or kind == "empirical":
            check_labels(arguments[0])
        if is_traced(arguments):
            static = model, kind, examples_per_chunk
            one = lambda part, part_key: part_sum(*static, part, part_key, *arguments)  # noqa: E731
            total = _chunks.sum_over_chunks(one, merged(), key, chunk)
        else:
            # keep each part sharded like the parameters, or the compiler may gather the sum
            placement = _placement.placement_like(0.0 if part_sum is _loss_sum else arguments[0])
            compiled = jitted(
                _placement.placed, part_sum, placement, model, kind, examples_per_chunk
            )
            added = jitted(_placement.placed, _added, placement)
            divided = jitted(_placement.placed, _divided, placement)
            # loop in Python: loops inside XLA are slow for convolutions on the CPU
            total = None
            for i, batch in enumerate(batches):
                part_key = jax.random.fold_in(key, i) if kind == "sampled" else key
                part = compiled(plain(batch), part_key, *arguments)
                total = part if total is None else added(total, part)
            return divided(total, examples)
        return _divided(total, examples)

    return Curvature(
        loss=lambda params: mean(_loss_sum, params),
        gradient=lambda params: mean(_gradient_sum, params),
        product=lambda params, vector: mean(_product_sum, params, vector),
        missing=missing,
    )


def with_gradient(around: Curvature | None, gradient: Any) -> Curvature:
    """Returns a curvature with a fixed gradient, independent of the parameters.

    Args:
        around: Curvature that provides the other functions; None if only the gradient is known.
        gradient: Gradient of the loss, a pytree like the parameters.
    """
    if around is None:
        return Curvature(_unknown, lambda params: gradient, _unknown)
    missing = tuple(name for name in around.missing if name != "gradient")
    return around._replace(gradient=lambda params: gradient, missing=missing)


def over_axis(around: Curvature, axis_name: str) -> Curvature:
    """Averages a curvature over the devices of a named axis, each with its own batch."""

    def averaged(function):
        return lambda *at: axis.mean(function(*axis.varying(at, axis_name)), axis_name)

    return Curvature(*map(averaged, around[:3]), missing=around.missing)


def _added(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _divided(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x / number, tree)


def _unknown(*_):
    raise ValueError("model and batch are needed for losses and Fisher products")


def _loss_sum(model, kind, chunk, batch, key, params):
    del kind, key
    return losses(model, params, batch, examples_per_chunk=chunk).sum()


def _gradient_sum(model, kind, chunk, batch, key, params):
    return jax.grad(lambda p: _loss_sum(model, kind, chunk, batch, key, p))(params)


def _product_sum(model, kind, chunk, batch, key, params, vector):
    product = fisher_vector_product(
        model, params, batch, vector, kind=kind, key=key, examples_per_chunk=chunk
    )
    return jax.tree.map(lambda x: x * _chunks.number_of_examples(batch), product)
