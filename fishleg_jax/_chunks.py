"""Sums over the examples of a batch, a chunk at a time, so that memory is bounded by a chunk."""

from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax._batch import BatchLike, number_of_examples, split_batch
from fishleg_jax._checks import numbers
from fishleg_jax._devices import sharding


def slice_examples(batch: BatchLike, begin: int, end: int) -> BatchLike:
    """Examples `begin` to `end` of a batch; its constants stay whole."""
    inputs, targets, constants = split_batch(batch)
    inputs, targets = _picked((inputs, targets), slice(begin, end))
    return (inputs, targets, *constants)


def _picked(tree: Any, which: slice) -> Any:
    def one(x):
        number = len(range(x.shape[0])[which])
        return sharding.regroup(lambda x: x[which], x, (number, *x.shape[1:]), 0)

    return jax.tree.map(one, tree)


def split_into_chunks(batch: BatchLike, chunk: int) -> tuple[Any, BatchLike | None, Callable]:
    """Cuts a batch into equal chunks, one after the other, and leaves a smaller rest.

    Returns:
        The stacked chunks (every leaf `(chunks, chunk, ...)`), the rest as a batch (None where the
        chunk divides the batch), and a function that makes a batch of one of the stacked chunks.
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
    """Deals the examples of a batch out in turn, to equal parts.

    In turn, so that where a batch is spread over devices every part is.

    Args:
        batch: the batch.
        parts: how many parts at most: the largest number that divides the batch is taken.
    """
    examples = number_of_examples(batch)
    parts = next(n for n in range(parts, 0, -1) if examples % n == 0)
    inputs, targets, constants = split_batch(batch)
    return [(*_picked((inputs, targets), slice(k, None, parts)), *constants) for k in range(parts)]


def check_chunk(examples_per_chunk: int | None, axis_name: str | None = None) -> None:
    """Raises a ValueError for a chunk of no examples, or one inside a named axis."""
    if axis_name is not None and examples_per_chunk is not None:
        raise ValueError("axis_name and examples_per_chunk do not go together: one must be None")
    if examples_per_chunk is not None:
        numbers.check_count(examples_per_chunk, "examples_per_chunk", or_none=" or None")


def fits(batch: BatchLike, examples_per_chunk: int | None) -> bool:
    """Whether a batch is worked on in one piece."""
    check_chunk(examples_per_chunk)
    return examples_per_chunk is None or examples_per_chunk >= number_of_examples(batch)


def map_over_chunks(
    function: Callable[[BatchLike], Any], batch: BatchLike, examples_per_chunk: int | None
) -> Any:
    """`function(batch)`, a pytree with a row for every example, a chunk at a time.

    A leaf that has as many rows whatever the chunk is, one that all examples share, is that of the
    first chunk.  What a derivative needs of a chunk is made anew when that chunk has its turn.

    Args:
        function: maps a batch to a pytree of arrays.
        batch: the batch.
        examples_per_chunk: how many examples are worked on at once; None for all of them.
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
    """Adds up `function(chunk, key)`, a pytree that is a sum over examples, over a batch's chunks.

    Args:
        function: maps a batch and a random key to a pytree of arrays.
        batch: the batch.
        key: split into one key for each chunk.
        examples_per_chunk: how many examples are worked on at once; None for all of them.
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
