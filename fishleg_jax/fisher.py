"""The Fisher information of a model's weights: products with it, and per-example gradients.

Three Fishers are in use, and they are not the same matrix:

- `exact`: the expectation over the model's own distribution, `E_x[Jᵀ H J]` with `H` the Fisher in
  output space, which is the generalised Gauss-Newton matrix (Martens 2020, section 9).  No labels.
- `sampled`: the same expectation with one label drawn from the model for every example.
- `empirical`: the data's own labels.  It degenerates as the model fits its data (Kunstner et al.
  2019), and is here because WoodFisher and M-FAC are defined with it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _axis, _chunks, _mesh, _placement, _text, _tree, _validate
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax.model import Batch, Model, Params, check_model, losses, predict, split_batch

KINDS = ("exact", "sampled", "empirical")


def check_kind(kind: str, batch: Batch, key: jax.Array | None) -> None:
    """Raises a ValueError for an unknown Fisher, no batch, or where it lacks a key or labels."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _validate.check_batch_shapes(batch, "batch")
    if kind == "sampled" and key is None:
        raise ValueError("key is needed to sample labels: kind='sampled', key=jax.random.key(0)")
    if kind == "empirical" and split_batch(batch)[1] is None:
        raise ValueError("'empirical' needs labels, but the batch's targets are None")


def with_sampled_targets(
    model: Model,
    params: Params,
    batch: Batch,
    key: jax.Array,
    examples_per_chunk: int | None = None,
) -> Batch:
    """The batch with its targets drawn from the model's own distribution.

    They are the same whatever the chunk: outputs are made chunk by chunk, and drawn from at once.

    Args:
        model: the model.
        params: its parameters.
        batch: `(inputs, targets[, constants])`; the targets may be None.
        key: a random key.
        examples_per_chunk: how many examples are predicted at once; None for all of them.

    Returns:
        A batch of the same inputs and constants.
    """
    inputs, _, constants = split_batch(batch)
    outputs = _chunks.map_over_chunks(
        lambda chunk: predict(model, params, chunk), batch, examples_per_chunk
    )
    targets = model.likelihood.sample(key, jax.lax.stop_gradient(outputs))
    return (inputs, targets, *constants)


def linearise(model: Model, params: Params, batch: Batch) -> tuple[Any, Callable, Callable]:
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
    return outputs, jvp, lambda cotangent: transpose(cotangent)[0]


def output_gradient(model: Model, outputs: Any, targets: Any, weights: jax.Array) -> Any:
    """The gradient with respect to the outputs of the losses, weighted example by example."""
    losses, pull_back = jax.vjp(
        lambda o: model.likelihood.negative_log_likelihood(o, targets), outputs
    )
    return pull_back(_placement.like(weights, losses))[0]


def output_fisher(model: Model, outputs: Any, targets: Any, tangent: Any, kind: str) -> Any:
    """The Fisher in output space times a tangent: exact, or of rank one for every example.

    Args:
        model: the model.
        outputs: what it predicts.
        targets: labels, the data's or sampled; `exact` does not look at them.
        tangent: of the outputs' structure.
        kind: `exact`, `sampled` or `empirical`.
    """
    if kind == "exact":
        return model.likelihood.fisher(outputs, tangent)
    # δ (δᵀ J v) with δ the gradient at the outputs, so that Jᵀ of it is g (gᵀ v)
    _, inner = jax.jvp(
        lambda o: model.likelihood.negative_log_likelihood(o, targets), (outputs,), (tangent,)
    )
    return output_gradient(model, outputs, targets, inner)


@_mesh.in_mesh_of_params
def fisher_vector_product(
    model: Model,
    params: Params,
    batch: Batch,
    vector: Params,
    *,
    kind: str = "exact",
    key: jax.Array | None = None,
    examples_per_chunk: int | None = None,
) -> Params:
    """The undamped Fisher of a batch times a vector, `F v`, averaged over examples.

    One jvp and one vjp through the model for every chunk; no matrix is formed.

    Args:
        model: the model.
        params: its parameters, any pytree of floating-point arrays.
        batch: `(inputs, targets[, constants])`.  Only the empirical Fisher looks at the targets.
        vector: a pytree of the parameters' structure, shapes and dtypes.
        kind: `exact`, `sampled` or `empirical`, see the module.
        key: a random key, for `sampled`.
        examples_per_chunk: bounds memory: that many examples are worked on at once (a `lax.scan`).
            The product is the same whatever it is; `sampled` then takes one more forward pass.

    Returns:
        A pytree of the parameters' structure, shapes and dtypes.

    Raises:
        ValueError: an unknown kind, what is no batch, a missing key, missing labels, a vector of
            another structure.

    References:
        Martens, New insights and perspectives on the natural gradient method, 2020, section 8;
        Schraudolph, Fast curvature matrix-vector products, 2002.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> flj.fisher_vector_product(model, jnp.zeros(2), (inputs, None), jnp.ones(2))
        Array([0.5, 2. ], dtype=float32)
    """
    check_model(model)
    check_kind(kind, batch, key)
    _tree.check_same(params, vector, "vector")

    def product(chunk, chunk_key):
        outputs, jvp, vjp = linearise(model, params, chunk)
        targets = split_batch(chunk)[1]
        if kind == "sampled":
            targets = model.likelihood.sample(chunk_key, outputs)
        return vjp(output_fisher(model, outputs, targets, jvp(vector), kind))

    key = jax.random.key(0) if key is None else key
    if kind == "sampled" and not _chunks.fits(batch, examples_per_chunk):
        batch = with_sampled_targets(model, params, batch, key, examples_per_chunk)
        kind = "empirical"
    total = _chunks.sum_over_chunks(product, batch, key, examples_per_chunk)
    examples = _chunks.number_of_examples(batch)
    return _placement.like(jax.tree.map(lambda x: x / examples, total), params)


class Curvature(NamedTuple):
    """The loss around a point on fixed data.

    Attributes:
        loss: `(params) -> scalar`, the mean loss in nats per example.
        gradient: `(params) -> tangent`, its gradient.
        product: `(params, vector) -> tangent`, the undamped Fisher times a vector.
        check: like `loss`, on other data by which steps are checked; None where there are none.
        missing: which of `loss` and `gradient` can't be told, as the data have no labels.
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
    batches: Sequence[Batch],
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
    check_kind(kind, batches[0], key)
    key = jax.random.key(0) if key is None else key
    constants = split_batch(batches[0])[2]
    labelled = all(split_batch(batch)[1] is not None for batch in batches)
    chunk = max(_chunks.number_of_examples(b) for b in batches)
    examples = sum(_chunks.number_of_examples(b) for b in batches)

    @functools.cache
    def merged():  # only when it is asked for: many compensations never do
        if len(batches) == 1:
            return tuple(batches[0])
        with jax.ensure_compile_time_eval():
            pairs = [tuple(b[:2]) for b in batches]
            return (*jax.tree.map(lambda *xs: jnp.concatenate(xs), *pairs), *constants)

    @_mesh.in_mesh_of_params
    def mean(part_sum, *arguments):
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
                part = compiled(tuple(batch), jax.random.fold_in(key, i), *arguments)
                total = part if total is None else jax.tree.map(jnp.add, total, part)
        return jax.tree.map(lambda x: x / examples, total)

    return Curvature(
        loss=lambda params: mean(_loss_sum, params),
        gradient=lambda params: mean(_gradient_sum, params),
        product=lambda params, vector: mean(_product_sum, params, vector),
        missing=() if labelled else ("loss", "gradient"),
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
        return lambda *at: _axis.mean(function(*_axis.varying(at, axis_name)), axis_name)

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
