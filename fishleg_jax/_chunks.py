"""Maps and sums over the examples of a batch in chunks, which bound memory."""

from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax import _text
from fishleg_jax._batch import BatchLike, number_of_examples, split_batch
from fishleg_jax._checks import numbers
from fishleg_jax._devices import sharding


def slice_examples(batch: BatchLike, begin: int, end: int) -> BatchLike:
    """Slices examples `begin` to `end` of a batch; constants stay whole."""
    inputs, targets, constants = split_batch(batch)
    inputs, targets = _picked((inputs, targets), slice(begin, end))
    return (inputs, targets, *constants)


def _picked(tree: Any, which: slice) -> Any:
    def one(x):
        number = len(range(x.shape[0])[which])
        return sharding.regroup(lambda x: x[which], x, (number, *x.shape[1:]), 0)

    return jax.tree.map(one, tree)


def split_into_chunks(batch: BatchLike, chunk: int) -> tuple[Any, BatchLike | None, Callable]:
    """Cuts a batch into consecutive chunks of equal size and a smaller remainder.

    Returns:
        The stacked chunks (every leaf `(chunks, chunk, ...)`), the remainder as a batch (None if
        the chunk divides the batch), and a function from one of the stacked chunks to a batch.
    """
    examples = number_of_examples(batch)
    whole = examples - examples % chunk
    inputs, targets, constants = split_batch(slice_examples(batch, 0, whole))

    def stack(x):
        shape = (whole // chunk, chunk, *x.shape[1:])
        return sharding.regroup(lambda x: x.reshape(shape), x, shape, 1)

    stacked = jax.tree.map(stack, (inputs, targets))
    rest = slice_examples(batch, whole, examples) if whole < examples else None
    return stacked, rest, lambda pair: (*pair, *constants)


def deal(batch: BatchLike, parts: int) -> list[BatchLike]:
    """Deals the examples of a batch in turn into parts of equal size.

    In turn, so that the parts of a sharded batch are sharded as well.

    Args:
        batch: Batch to split.
        parts: Maximum number of parts; the largest number up to it that divides the batch is used.
    """
    examples = number_of_examples(batch)
    parts = next(n for n in range(parts, 0, -1) if examples % n == 0)
    inputs, targets, constants = split_batch(batch)
    return [(*_picked((inputs, targets), slice(k, None, parts)), *constants) for k in range(parts)]


def check_chunk(examples_per_chunk: int | None, axis_name: str | None = None) -> None:
    """Raises a ValueError for an empty chunk, or for chunks inside a named axis."""
    if axis_name is not None and examples_per_chunk is not None:
        raise ValueError(
            "axis_name and examples_per_chunk cannot be combined: one of them must be None, got "
            f"{_text.shown(axis_name)} and {_text.shown(examples_per_chunk)}"
        )
    if examples_per_chunk is not None:
        numbers.check_count(examples_per_chunk, "examples_per_chunk", or_none=" or None")


def fits(batch: BatchLike, examples_per_chunk: int | None) -> bool:
    """Whether a batch fits into a single chunk."""
    check_chunk(examples_per_chunk)
    return examples_per_chunk is None or examples_per_chunk >= number_of_examples(batch)


def map_over_chunks(
    function: Callable[[BatchLike], Any], batch: BatchLike, examples_per_chunk: int | None
) -> Any:
    """Computes `function(batch)`, a pytree with one row per example, chunk by chunk.

    A leaf whose shape does not depend on the chunk, shared by all examples, is taken from the first
    chunk.  Derivatives recompute the inside of a chunk when they reach it.

    Args:
        function: Function from a batch to a pytree of arrays.
        batch: Batch to process.
        examples_per_chunk: Number of examples processed at a time; None for the whole batch.
    """
    if fits(batch, examples_per_chunk):
        return function(batch)
    stacked, rest, as_batch = split_into_chunks(batch, examples_per_chunk)
    of_chunk = jax.checkpoint(lambda pair: function(as_batch(pair)))
    parts = jax.lax.map(of_chunk, stacked)
    tail = [] if rest is None else [jax.checkpoint(function)(rest)]

    def join(whole, parts, *tail):
        if parts.shape[1:] == whole.shape:
            return parts[0]
        return sharding.joined(parts, *tail)

    return jax.tree.map(join, jax.eval_shape(function, batch), parts, *tail)


def sum_over_chunks(
    function: Callable[[BatchLike, jax.Array], Any],
    batch: BatchLike,
    key: jax.Array,
    examples_per_chunk: int | None,
) -> Any:
    """Adds up `function(chunk, key)`, a pytree of sums over examples, over the chunks of a batch.

    Args:
        function: Function from a batch and a random key to a pytree of arrays.
        batch: Batch to process.
        key: Random key, split into one per chunk.
        examples_per_chunk: Number of examples processed at a time; None for the whole batch.
    """
    if fits(batch, examples_per_chunk):
        return function(batch, key)
    stacked, rest, as_batch = split_into_chunks(batch, examples_per_chunk)
    rest_key, key = jax.random.split(key)
    keys = jax.random.split(key, jax.tree.leaves(stacked)[0].shape[0])
    add = lambda total, part: jax.tree.map(jax.numpy.add, total, part)  # noqa: E731

    start = sharding.zeros(
        jax.eval_shape(lambda: function(as_batch(jax.tree.map(lambda x: x[0], stacked)), key))
    )
    total, _ = jax.lax.scan(
        lambda total, pair: (add(total, function(as_batch(pair[0]), pair[1])), None),
        start,
        (stacked, keys),
    )
    return total if rest is None else add(total, function(rest, rest_key))
