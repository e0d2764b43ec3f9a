"""Factors of a kernel: their places in a pytree, and the kernel that they stand for.

Factors multiply to the leaf in the order of its own axes, whichever axis the network contracts, so
that they alone say what the kernel is:

- `split`: `left` has the leaf's leading axes and the rank, `right` the rank and the other axes.
- `chain`: every factor has as many axes as the leaf.  Along two of them, its channels, the factors
  are multiplied as matrices, and each other axis belongs to one factor; others have size 1 there.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fishleg_jax.low_rank.uses import Use

KEYS = (("left", "right"), ("first", "core", "last"))  # of factors, in the order of the leaf's axes


def factors_of(subtree: Any) -> list[Any] | None:
    """The factors in the place of a leaf, in the order of its axes; None for a whole leaf."""
    if isinstance(subtree, Mapping):
        for keys in KEYS:
            if set(subtree) == set(keys):
                return [subtree[key] for key in keys]
    return None


def arranged(leaf: Any, use: Use) -> Any:
    """A leaf as a kernel of shape (spatial axes, in, out), with all inputs of a dense layer merged.

    Args:
        leaf: Array of the leaf's shape.
        use: How the network uses the leaf.
    """
    moved = leaf.transpose(use.order)
    if use.before:
        return moved
    return moved.reshape(math.prod(moved.shape[: use.inputs]), -1)


def in_place(
    factors: Mapping[str, np.ndarray], use: Use, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Factors of an arranged kernel as factors of the leaf.

    Args:
        factors: Kernels of the layers, of shape (spatial axes, in, out), in the layers' order.
        use: How the network uses the leaf.
        shape: Shape of the leaf.
    """
    values = list(factors.values())
    if use.before:
        values = [x.transpose(np.argsort(use.order)) for x in values]
        turned = use.order[-2] > use.order[-1]
    else:
        turned = use.order[0] != 0
        first, last = (tuple(shape[k] for k in own) for own in (use.inside, use.outside))
        values = [values[0].reshape(*first, -1), values[1].reshape(-1, *last)]
        if turned:  # the rank moves from the last axis to the first, and the other way round
            values = [np.moveaxis(values[0], -1, 0), np.moveaxis(values[1], 0, -1)]
    return dict(zip(factors, reversed(values) if turned else values, strict=True))


def is_split(factors: Sequence[Any], shape: tuple[int, ...]) -> bool:
    """Whether factors are two that divide the axes of a leaf of this shape between them."""
    if len(factors) != 2:
        return False
    left, right = (x.shape for x in factors)
    return (
        left[-1:] == right[:1]
        and (*left[:-1], *right[1:]) == shape
        and 0 < len(left[1:]) < len(shape)
    )


def is_chain(factors: Sequence[Any], shape: tuple[int, ...], channels: tuple[int, int]) -> bool:
    """Whether factors make a leaf of this shape by products along two of its axes, in their order.

    If this holds for several pairs of axes, the leaf is the same array for all of them.
    """
    sizes = [x.shape for x in factors]
    if any(len(x) != len(shape) for x in sizes):
        return False
    p, q = channels
    inner = all(x[q] == y[p] for x, y in itertools.pairwise(sizes))
    rest = (k for k in range(len(shape)) if k not in channels)
    once = all(
        sorted(x[k] for x in sizes) == sorted([shape[k], *[1] * (len(sizes) - 1)]) for k in rest
    )
    return inner and once and (sizes[0][p], sizes[-1][q]) == (shape[p], shape[q])


def channels_of(factors: Sequence[Any], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Axes of a leaf along which factors are multiplied; None if they are not a chain."""
    pairs = itertools.combinations(range(len(shape)), 2)
    return next((pair for pair in pairs if is_chain(factors, shape, pair)), None)


def multiplied_out(factors: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """The leaf of this shape that factors stand for, a split or a chain."""
    if is_split(factors, shape):
        return jnp.tensordot(*factors, 1)
    channels = channels_of(factors, shape)
    product, *others = (jnp.moveaxis(x, channels, (-2, -1)) for x in factors)
    for x in others:
        product = product @ x
    return jnp.moveaxis(product, (-2, -1), channels)
