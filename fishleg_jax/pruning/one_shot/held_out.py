"""Sets examples aside that the curvature does not see."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fishleg_jax import _text
from fishleg_jax._batch import BatchLike, number_of_examples, split_batch
from fishleg_jax._checks.numbers import is_number
from fishleg_jax._devices import sharding

SHARE = 0.2  # default share
FEWEST = 16  # number of held-out examples below which none are set aside
MULTIPLE = 8  # of which both parts of a divided batch have a multiple of examples


def check_share(held_out: Any) -> None:
    """Raises a ValueError for a share of examples outside [0, 1)."""
    if is_number(held_out) and not 0 <= held_out < 1:
        raise ValueError(
            f"held_out must be batches or a share in [0, 1), got {_text.shown(held_out)}"
        )


def set_aside(
    batches: Sequence[BatchLike], share: float
) -> tuple[list[BatchLike], list[BatchLike] | None]:
    """Divides batches into those for the curvature and those to measure the loss on.

    Whole batches, evenly spread over the sequence, where there are enough; else examples of every
    batch, evenly spread over it, in numbers that devices divide.

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
        parts = [_divided(b, n) for b, n in zip(batches, counts, strict=True)]
        first = [own for own, _ in parts]
        second = [other for _, other in parts if number_of_examples(other)]
    if not first or not share or sum(map(number_of_examples, second)) < FEWEST:
        return batches, None
    return first, second


def _whole(count: float, multiple: int) -> int:
    return round(count / multiple) * multiple


def _devices(batch: BatchLike) -> int:
    """Number of devices that a batch's examples may be sharded over."""
    leaf = jax.tree.leaves(batch[0])[0]
    placement = getattr(leaf, "sharding", None)
    return 1 if placement is None else len(placement.device_set)


def _divided(batch: BatchLike, count: int) -> tuple[BatchLike, BatchLike]:
    """A batch without some of its examples, and these; with its constants, sharded as it was."""
    number = number_of_examples(batch)
    out = np.zeros(number, bool)
    out[np.floor((np.arange(count) + 0.5) * number / max(count, 1)).astype(int)] = True
    inputs, targets, constants = split_batch(batch)

    def part(rows):
        def taken(x):
            return sharding.regroup(lambda x: x[rows], x, (len(rows), *x.shape[1:]), 0)

        return (*jax.tree.map(taken, (inputs, targets)), *constants)

    return part(np.flatnonzero(~out)), part(np.flatnonzero(out))
