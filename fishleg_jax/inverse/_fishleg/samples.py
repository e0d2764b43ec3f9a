"""Probes, Fisher samples and Fisher products of a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _chunks, _convolutions, _labels, _random, _tree, fisher
from fishleg_jax._devices import axis, mesh, sharding
from fishleg_jax.model import Model, loss, predict, split_batch

ROW_NUMBERS = 2**26  # numbers in the gradients of single examples or groups held at a time
SAMPLES = 64  # of a batch at most: more examples are added up, which keeps what they say
PARTS = 4  # samples of a batch on a mesh, or in whose small groups a gradient does not fit


def group_size(params: Any, examples: int, least: int, examples_per_chunk: int | None) -> int:
    """Number of examples in each of the groups whose gradients are held together.

    The smallest from `least` on that divides the batch, so that there are at most `SAMPLES`, which
    bounds the products with frames, and all of these gradients fit into `ROW_NUMBERS`, or are no
    more than `PARTS`.  Single examples give the most samples; their sums over groups have the same
    covariance, with hardly less information where gradients are heavy-tailed.
    """
    weights = max(sum(x.size for x in jax.tree.leaves(params)), 1)
    most = min(max(ROW_NUMBERS // weights, PARTS), SAMPLES)
    chunk = examples if examples_per_chunk is None else examples_per_chunk
    sizes = [n for n in range(1, examples + 1) if examples % n == 0]
    return next(
        (n for n in sizes if examples <= n * most and min(least, examples) <= n <= chunk), 1
    )


def on_mesh(params: Any, batch: Any, axis_name: str | None) -> bool:
    """Whether arrays are, or may be, sharded over devices, where single examples are costly.

    With `axis_name`, where each device has its own arrays, only if a mesh says so.
    """
    known = mesh.explicit_mesh((params, batch)) or mesh.automatic_mesh((params, batch))
    maybe = axis_name is None and mesh.is_unknown() and jax.device_count() > 1
    return known is not None or maybe


def rows(
    model: Model,
    params: Any,
    batch: Any,
    key: jax.Array,
    kind: str,
    size: int,
    examples_per_chunk: int | None,
    axis_name: str | None,
) -> Any:
    """Fisher samples of groups of consecutive examples, along a leading axis of every leaf.

    A sample is the gradient of random signs times a root of the Fisher in output space, or, for
    likelihoods that have none and for the sampled Fisher, the score of labels drawn from the model;
    summed over the group and divided by the root of its size, so that its covariance is the Fisher.
    With `axis_name` these are the samples of the device's own examples.

    Args:
        model: Model to differentiate.
        params: Weights, in float32 or better.
        batch: Data.
        key: Random key.
        kind: Fisher to sample; `empirical` uses the batch's own labels, with random signs.
        size: Number of examples in a group, which divides the batch.
        examples_per_chunk: Number of examples processed at a time; None for the whole batch.
        axis_name: Axis of devices, or None.
    """
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params = axis.varying(params, axis_name)
    inputs, targets, constants = split_batch(batch)
    # the batch's own labels mark the outputs to exclude
    own = targets if kind == "empirical" or model.likelihood.takes_targets else None
    groups = _chunks.number_of_examples(batch) // size
    grouped = jax.tree.map(lambda x: x.reshape(groups, size, *x.shape[1:]), (inputs, own))

    def gradients(shared, groups):
        params, constants = shared

        def gradient(group):
            (inputs, labels), key = group
            part = inputs, None, *constants
            outputs, pull_back = jax.vjp(lambda p: predict(model, p, part), params)
            weights = jnp.full((size,), size**-0.5, jnp.result_type(*jax.tree.leaves(params)))
            weights = axis.varying(weights, axis_name)
            if kind == "exact" and model.likelihood.root is not None:
                score = _labels.noise(model.likelihood, key, outputs, labels)
                score = jax.tree.map(lambda x: x * size**-0.5, score)
            else:
                if kind == "empirical":
                    weights = weights * jax.random.rademacher(key, weights.shape, weights.dtype)
                else:
                    labels = _labels.sample(model.likelihood, key, outputs, labels)
                score = fisher.output_gradient(model, outputs, labels, weights)
            return pull_back(jax.tree.map(lambda c, o: c.astype(o.dtype), score, outputs))[0]

        if _chunks.fits(batch, examples_per_chunk):
            return jax.vmap(gradient)(groups)
        return jax.lax.map(gradient, groups, batch_size=max(examples_per_chunk // size, 1))

    fast = functools.partial(_convolutions.in_fast_groups, gradients)
    return fast((params, constants), (grouped, jax.random.split(key, groups)))


def pull(
    model: Model,
    params: Any,
    batch: Any,
    z: Any,
    key: jax.Array,
    kind: str,
    starting: jax.Array,
    cut: tuple[int, int],
    examples_per_chunk: int | None,
    axis_name: str | None,
) -> list[list[jax.Array]]:
    """Returns a Fisher sample per part of the batch during the start, then the Fisher times z.

    Both take one vjp; without z there are samples only.  The loop over parts is unrolled: under
    `vmap` the weights' gradients of convolutions take twice as long on the CPU.  With `axis_name` a
    part spans all devices.  There are at most `cut[0]` parts, of at least `cut[1]` examples each.
    """
    devices, leaves = 1, jax.tree.leaves(params)
    if axis_name is not None:
        devices = jax.lax.axis_size(axis_name)
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        params, z = axis.varying((params, z), axis_name)

    def with_labels(part, part_key):
        inputs, targets, constants = split_batch(part)
        # the batch's own labels mark the outputs to exclude
        own = targets if model.likelihood.takes_targets else None
        # scores of sampled labels have mean zero and are independent between examples, so that
        # their sum over a batch has the batch's summed Fisher for its covariance; those of the
        # data's labels need random signs for that
        weights = jnp.ones(_chunks.number_of_examples(part), jnp.result_type(*leaves))
        if kind == "empirical":
            weights = jax.random.rademacher(part_key, weights.shape, weights.dtype)
        elif draws:
            targets = own  # sampled later, from outputs that the product computes anyway
        else:
            draw = lambda: fisher.with_sampled_targets(  # noqa: E731
                model, params, part, part_key, examples_per_chunk
            )[1]
            drawn = jax.eval_shape(draw)
            none = lambda: sharding.zeros(drawn)  # noqa: E731
            if own is not None:
                none = lambda: jax.tree.map(lambda x, d: x.astype(d.dtype), own, drawn)  # noqa: E731
            # after the start the exact Fisher uses labels only to exclude outputs
            targets = jax.lax.cond(jnp.asarray(starting) | (kind == "sampled"), draw, none)
        return inputs, (targets, axis.varying(weights, axis_name)), *constants

    # z has the widest of the leaves' dtypes: cast it back
    if z is not None:
        z = jax.tree.map(lambda x, p: x.astype(p.dtype), z, params)

    def of_chunk(chunk, chunk_key):
        inputs, (targets, weights), constants = split_batch(chunk)
        outputs, jvp, vjp = fisher.linearise(model, params, (inputs, None, *constants))
        if draws:
            targets = _labels.sample(model.likelihood, chunk_key, outputs, targets)
        score = fisher.output_gradient(model, outputs, targets, weights)
        if z is None:
            return vjp(score)
        product = fisher.output_fisher(model, outputs, targets, jvp(z), kind)
        return vjp(optax.tree.where(starting, score, product))

    # deal the batch into parts, and pull back one cotangent for each
    most, least = cut
    parts = _chunks.deal(batch, max(min(most, _chunks.number_of_examples(batch) // least), 1))
    draws = kind != "empirical" and _chunks.fits(parts[0], examples_per_chunk)
    examples = devices * _chunks.number_of_examples(parts[0])
    scale = jnp.where(jnp.asarray(starting), examples**-0.5, 1 / examples)
    pulled = [
        [
            x * scale.astype(x.dtype)
            for x in jax.tree.leaves(
                _chunks.sum_over_chunks(
                    _convolutions.with_fast_groups(of_chunk),
                    with_labels(part, part_key),
                    part_key,
                    examples_per_chunk,
                )
            )
        ]
        for part, part_key in zip(parts, jax.random.split(key, len(parts)), strict=True)
    ]
    return pulled if axis_name is None else jax.lax.psum(pulled, axis_name)


def draw_probe(
    probe: str,
    model: Model,
    params: Any,
    batch: Any,
    key: jax.Array,
    chunk: int | None,
    axis_name: str | None,
) -> list[jax.Array]:
    """Draws the vector u: standard normal, random signs, or the batch's normalised gradient."""
    if probe == "gradient":
        gradient = jax.grad(lambda p: loss(model, p, batch, examples_per_chunk=chunk))(
            axis.varying(params, axis_name)
        )
        gradient = axis.mean(gradient, axis_name)
        norm = jnp.sqrt(_tree.dot(gradient, gradient))
        return [g / jnp.maximum(norm, jnp.finfo(g.dtype).tiny) for g in jax.tree.leaves(gradient)]
    leaves = jax.tree.leaves(params)
    random = _random.signs if probe == "sign" else jax.random.normal
    return sharding.automatic(lambda key: _random.like(leaves, key, random), leaves, key)
