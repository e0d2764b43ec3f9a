"""The curvature of the loss on fixed batches: loss, gradient, products with the Fisher."""

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
    """The loss around a point on fixed data.

    Attributes:
        loss: `(params) -> scalar`, the mean loss in nats per example.
        gradient: `(params) -> tangent`, its gradient.
        product: `(params, vector) -> tangent`, the undamped Fisher times a vector.
        check: like `loss`, on other data by which steps are checked; None where there are none.
        missing: which of the functions can't be used: `loss` and `gradient` where the data have no
            labels, `product` where the likelihood has no `fisher` or `sample` for it.
    """

    loss: Callable[[Params], jax.Array]
    gradient: Callable[[Params], Any]
    product: Callable[[Params, Params], Any]
    check: Callable[[Params], jax.Array] | None = None
    missing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


def curvature(
    model: Model,
    batches: Sequence[BatchLike],
    *,
    kind: str = "exact",
    key: jax.Array | None = None,
    examples_per_chunk: int | None = None,
) -> Curvature:
    """Loss, gradient and Fisher products on fixed mini-batches, with the activations of one.

    Args:
        model: the model.
        batches: a sequence of batches with the same constants; sizes may differ.
        kind: which Fisher, see the module.
        key: a random key, for the sampled Fisher; the same labels throughout.
        examples_per_chunk: bounds the activations further: so many examples of a batch at once.

    Returns:
        Three functions of the parameters: a loop over the batches, or under `jit` a `lax.scan`.

    Raises:
        ValueError: no batch, an unknown kind, a missing key, missing labels.

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

    missing = () if labelled else ("loss", "gradient")
    needed = {"exact": model.likelihood.fisher, "sampled": model.likelihood.sample}
    missing += ("product",) if needed.get(kind, True) is None else ()

    known: dict = {}
    unchecked = [*enumerate(batches)]

    def check_labels(params):  # once, when the parameters say what the outputs are like
        while unchecked:
            i, batch = unchecked[0]
            check_targets(model, params, batch, f"batches[{i}]", known)
            unchecked.pop(0)

    @functools.cache
    def merged():  # only when it is asked for: many compensations never do
        if len(batches) == 1:
            return (*batches[0][:2], *constants)
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
            # each part is spread like the parameters, or the compiler may gather the sum
            placement = _placement.placement_like(0.0 if part_sum is _loss_sum else arguments[0])
            compiled = jitted(
                _placement.placed, part_sum, placement, model, kind, examples_per_chunk
            )
            # a loop here rather than in XLA, whose loops are slow for convolutions on the CPU
            total = None
            for i, batch in enumerate(batches):
                part = compiled(plain(batch), jax.random.fold_in(key, i), *arguments)
                total = part if total is None else jax.tree.map(jnp.add, total, part)
        return jax.tree.map(lambda x: x / examples, total)

    return Curvature(
        loss=lambda params: mean(_loss_sum, params),
        gradient=lambda params: mean(_gradient_sum, params),
        product=lambda params, vector: mean(_product_sum, params, vector),
        missing=missing,
    )


def with_gradient(around: Curvature | None, gradient: Any) -> Curvature:
    """A curvature whose gradient is already known, whatever point is asked for.

    Args:
        around: the others of its functions; None where nothing else is known.
        gradient: the gradient, a pytree like the parameters.
    """
    if around is None:
        return Curvature(_unknown, lambda params: gradient, _unknown)
    missing = tuple(name for name in around.missing if name != "gradient")
    return around._replace(gradient=lambda params: gradient, missing=missing)


def over_axis(around: Curvature, axis_name: str) -> Curvature:
    """A curvature averaged over the devices of an axis, each with a batch of its own."""

    def averaged(function):
        return lambda *at: axis.mean(function(*axis.varying(at, axis_name)), axis_name)

    return Curvature(*map(averaged, around[:3]), missing=around.missing)


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
