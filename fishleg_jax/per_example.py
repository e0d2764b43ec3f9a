"""Gradients of a batch, one per example or per group of examples."""

import functools

import jax

from fishleg_jax import _chunks, _convolutions, _labels, _text
from fishleg_jax._checks import numbers
from fishleg_jax._devices import mesh, sharding
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._output_space import with_sampled_targets
from fishleg_jax.fisher import check_kind
from fishleg_jax.model import (
    BatchLike,
    Model,
    Params,
    check_model,
    check_targets,
    loss,
    split_batch,
)


@mesh.in_mesh_of_params
def per_example_gradients(
    model: Model,
    params: Params,
    batch: BatchLike,
    *,
    labels: str = "empirical",
    key: jax.Array | None = None,
    examples_per_gradient: int = 1,
    examples_per_chunk: int | None = None,
) -> Params:
    """Gradient of the loss of each example, or of the mean loss of each group of examples.

    If the batch is sharded, each device processes its own shard.  Under Explicit axes sharding is
    left to JAX and to a model that names axes; for a network with convolutions call this function
    in `jax.sharding.auto_axes`, as the estimates do, with a model that does not name axes.

    Args:
        model: Model to differentiate.
        params: Model parameters, `d` numbers in all.
        batch: Data `(inputs, targets[, constants])` of `m` examples.
        labels: Source of the labels: `empirical` (default) for the batch's own targets, `sampled`
            for targets drawn from the model (except tokens that
            `likelihoods.categorical(ignore=...)` excludes).
        key: Random key, required for `sampled`.
        examples_per_gradient: Number of consecutive examples averaged into one gradient; must
            divide `m`.
        examples_per_chunk: Maximum number of examples processed at a time, which bounds the memory
            of activations; None for the whole batch.  The result holds all gradients either way.

    Returns:
        Pytree with the parameters' structure whose leaves have a leading axis of
        `m / examples_per_gradient`.

    Raises:
        ValueError: Unknown labels, an invalid batch, a missing key, missing or invalid targets, a
            likelihood without `sample`, or an `examples_per_gradient` that does not divide `m`.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([-1.0, 1.0]))
        >>> flj.per_example_gradients(model, jnp.zeros(2), batch)
        Array([[ 1.,  0.],
               [-0., -2.]], dtype=float32)
    """
    # validate the arguments before anything is compiled
    if labels not in ("empirical", "sampled"):
        raise ValueError(f"labels must be 'empirical' or 'sampled', got {_text.shown(labels)}")
    check_model(model)
    check_kind(labels, batch, key)
    _labels.require_kind(model.likelihood, labels)
    if labels == "empirical":
        check_targets(model, params, batch)
    # outside of `jit`, arrays on a mesh with Auto axes go through one compiled call
    params, batch = sharding.anchored((params, batch))
    if mesh.automatic_mesh((params, batch)) is not None and not is_traced((params, batch)):
        settings = model, labels, examples_per_gradient, examples_per_chunk
        return jitted(_per_example_gradients, *settings)(params, batch, key)
    if labels == "sampled":
        batch = with_sampled_targets(model, params, batch, key, examples_per_chunk)
    _chunks.check_chunk(examples_per_chunk)
    # group consecutive examples along a new leading axis
    inputs, targets, constants = split_batch(batch)
    examples = _chunks.number_of_examples(batch)
    check_gradients(examples, examples_per_gradient)
    groups = jax.tree.map(
        lambda x: x.reshape(-1, examples_per_gradient, *x.shape[1:]), (inputs, targets)
    )

    def gradients(shared, groups):
        params, constants = shared

        def gradient(group):
            whole = (*group, *constants)
            return jax.grad(lambda p: loss(model, p, whole, examples_per_chunk=examples_per_chunk))(
                params
            )

        if _chunks.fits(batch, examples_per_chunk):
            return jax.vmap(gradient)(groups)
        # a device holds the same fraction of a chunk as of the batch
        number = examples // examples_per_gradient
        here = jax.tree.leaves(groups)[0].shape[0]
        at_once = max(examples_per_chunk // examples_per_gradient * here // number, 1)
        return jax.lax.map(gradient, groups, batch_size=at_once)

    fast = functools.partial(_convolutions.in_fast_groups, gradients)
    return sharding.of_examples(fast, (params, constants), groups)


def _per_example_gradients(model, labels, examples_per_gradient, examples_per_chunk, *arrays):
    params, batch, key = arrays
    return per_example_gradients(
        model,
        params,
        batch,
        labels=labels,
        key=key,
        examples_per_gradient=examples_per_gradient,
        examples_per_chunk=examples_per_chunk,
    )


def check_gradients(examples: int, examples_per_gradient: int) -> None:
    """Raises a ValueError unless a batch divides into gradients of this number of examples."""
    if not numbers.is_whole(examples_per_gradient, 1) or examples % examples_per_gradient:
        raise ValueError(
            f"examples_per_gradient must be at least 1 and divide the batch's {examples} examples, "
            f"got {examples_per_gradient}"
        )
