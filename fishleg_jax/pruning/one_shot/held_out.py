"""Sets examples aside that the curvature does not see."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from fishleg_jax._batch import Batch, BatchLike, number_of_examples
from fishleg_jax._checks.numbers import is_number
from fishleg_jax._chunks import slice_examples

FEWEST = 16  # number of held-out examples below which none are set aside
MULTIPLE = 8  # of which both parts of a divided batch have a multiple of examples


def check_share(held_out: Any) -> None:
    """Raises a ValueError for a share of examples outside [0, 1)."""
    if is_number(held_out) and not 0 <= held_out < 1:
        raise ValueError(f"held_out must be batches or a share in [0, 1), got {held_out!r}")


def set_aside(
    batches: Sequence[BatchLike], share: float
) -> tuple[list[BatchLike], list[BatchLike] | None]:
    """Divides batches into those for the curvature and those to measure the loss on.

    Whole batches, evenly spread over the sequence, where there are enough; else the last examples
    of every batch, in numbers that devices divide.

    Returns:
        The two parts; all batches and None if too few examples would be held out.
    """
    batches, number = list(batches), round(share * len(batches))
    if number:
        out = {math.floor((i + 0.5) * len(batches) / number) for i in range(number)}
        first = [b for i, b in enumerate(batches) if i not in out]
        second = [b for i, b in enumerate(batches) if i in out]
    else:
        multiple = math.lcm(MULTIPLE, *map(_devices, batches))
        counts = [_whole(share * number_of_examples(b), multiple) for b in batches]
        ends = [number_of_examples(b) - n for b, n in zip(batches, counts, strict=True)]
        pairs = list(zip(batches, counts, ends, strict=True))
        first = [_part(b, 0, end) for b, _, end in pairs]
        second = [_part(b, end, end + n) for b, n, end in pairs if n]
    if not first or not share or sum(map(number_of_examples, second)) < FEWEST:
        return batches, None
    return first, second


def _whole(count: float, multiple: int) -> int:
    return round(count / multiple) * multiple


def _devices(batch: BatchLike) -> int:
    """Number of devices that a batch's examples may be sharded over."""
    leaf = jax.tree.leaves(batch[0])[0]
    sharding = getattr(leaf, "sharding", None)
    return 1 if sharding is None else len(sharding.device_set)


def _part(batch: BatchLike, begin: int, end: int) -> BatchLike:
    """Examples `begin` to `end` of a batch, with its constants, sharded as they were."""
    inputs, targets, *constants = slice_examples(batch, begin, end)
    return Batch(inputs, targets, *constants) if constants else (inputs, targets)
