"""Probes, Fisher samples and Fisher products of a batch."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _convolutions, _labels, _tree, fisher
from fishleg_jax._devices import axis, sharding
from fishleg_jax.model import Model, loss, split_batch


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

    Both take one vjp.  The loop over parts is unrolled: under `vmap` the weights' gradients of
    convolutions take twice as long on the CPU.  With `axis_name` a part spans all devices.  There
    are at most `cut[0]` parts, of at least `cut[1]` examples each.
    """
    devices = 1
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
        weights = jnp.ones(_chunks.number_of_examples(part), jax.tree.leaves(z)[0].dtype)
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
            targets = jax.lax.cond(starting | (kind == "sampled"), draw, none)
        return inputs, (targets, axis.varying(weights, axis_name)), *constants

    # z has the widest of the leaves' dtypes: cast it back
    z = jax.tree.map(lambda x, p: x.astype(p.dtype), z, params)

    def of_chunk(chunk, chunk_key):
        inputs, (targets, weights), constants = split_batch(chunk)
        outputs, jvp, vjp = fisher.linearise(model, params, (inputs, None, *constants))
        if draws:
            targets = _labels.sample(model.likelihood, chunk_key, outputs, targets)
        score = fisher.output_gradient(model, outputs, targets, weights)
        product = fisher.output_fisher(model, outputs, targets, jvp(z), kind)
        return vjp(_tree.keep_where(starting, score, product))

    # deal the batch into parts, and pull back one cotangent for each
    whole = _chunks.number_of_examples(batch)
    most, least = cut
    parts = _chunks.deal(batch, max(min(most, whole // least), 1))
    draws = kind != "empirical" and _chunks.fits(parts[0], examples_per_chunk)
    examples = devices * _chunks.number_of_examples(parts[0])
    scale = jnp.where(starting, examples**-0.5, 1 / examples)
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

    def draw(key):
        # one draw for all leaves: one per leaf takes minutes to compile on networks with many
        sizes = [x.size for x in leaves]
        random = signs if probe == "sign" else jax.random.normal
        flat = random(key, (sum(sizes),), jnp.result_type(*leaves))
        parts = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
        return [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]

    return sharding.automatic(draw, leaves, key)


def signs(key: jax.Array, shape: tuple[int], dtype: Any) -> jax.Array:
    """Draws a vector of random signs, 32 from each random word."""
    (size,) = shape
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1 - 2 * bits.reshape(-1)[:size].astype(dtype)
