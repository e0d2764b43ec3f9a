"""How many weights a schedule asks to be pruned at a step, under `jit`."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax.pruning.masks import number_to_prune

PARTS = 1_000_000  # a traced sparsity is read to six decimals, which float32 holds
FAR = 2**30  # a step after the end of any schedule


class Asked(NamedTuple):
    """What a schedule asks for at a step.

    Attributes:
        sparsity: as a number; NaN where it is none in [0, 1).
        counts: how many weights of every group.
        flat: whether it asks for no more up to the next regular mask update.
        final: whether it will never ask for more, as far as is known.
    """

    sparsity: jax.Array  # shape=(), float32
    counts: list[jax.Array]  # shape=(), int32
    flat: jax.Array  # shape=(), bool
    final: jax.Array  # shape=(), bool


def floor_share(sparsity: Any, weights: int) -> jax.Array:
    """`floor(sparsity · weights)` in whole numbers, of a sparsity read to six decimals.

    In floating point 0.95 of 100 may be 94.99999.

    Args:
        sparsity: a scalar in [0, 1), may be traced.
        weights: how many weights there are, fewer than 2³¹.

    Returns:
        A whole number, int32.

    Example:
        >>> floor_share(jnp.float32(0.29), 100)
        Array(29, dtype=int32)
    """
    parts = jnp.round(jnp.asarray(sparsity) * PARTS).astype(jnp.int32)
    parts = jnp.clip(parts, 0, PARTS - 1)
    # in two digits of a thousand: the product itself has too many for int32
    whole, rest = divmod(weights, PARTS)
    high, low = (parts // 1000) * rest, (parts % 1000) * rest
    carry = ((high % 1000) * 1000 + low % PARTS) // PARTS
    return parts * whole + high // 1000 + low // PARTS + carry


def asked_at(
    sparsity: Any, sizes: Sequence[int], step: jax.Array, ahead: jax.Array, before: jax.Array
) -> Asked:
    """What a number, an array or a schedule asks for.

    Args:
        sparsity: a Python or NumPy number, of which the counts are exact; an array, traced or not;
            or a function of the step.  If the function has an attribute `final`, a number, the
            counts of that are exact, too.
        sizes: how many weights each group has.
        step: the number of the step, the first is 1.
        ahead: that of the next regular mask update after it.
        before: what was asked for at the step before.
    """
    if is_number(sparsity):
        value = jnp.asarray(float(sparsity), jnp.float32)
        yes = jnp.array(True)
        return Asked(value, _exact(sparsity, sizes), yes, yes)
    if not callable(sparsity):
        value = _sound(sparsity)
        return Asked(value, _floors(value, sizes), value == before, jnp.array(False))
    value, after, last = (_sound(sparsity(s)) for s in (step, ahead, jnp.full_like(step, FAR)))
    counts, flat = _floors(value, sizes), after == value
    final = getattr(sparsity, "final", None)
    if is_number(final):
        reached = value >= jnp.asarray(float(final), value.dtype)
        pairs = zip(_exact(final, sizes), counts, strict=True)
        counts = [jnp.where(reached, exact, count) for exact, count in pairs]
    return Asked(value, counts, flat, flat & (value >= last))


def is_number(x: Any) -> bool:
    """Whether it is a Python or NumPy number, known before anything is traced."""
    return isinstance(x, (numbers.Real, np.generic)) and not isinstance(x, bool)


def _exact(sparsity: Any, sizes: Sequence[int]) -> list[jax.Array]:
    return [jnp.asarray(number_to_prune(sparsity, n), jnp.int32) for n in sizes]


def _floors(value: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    value = jnp.where(jnp.isnan(value), 0, value)
    return [floor_share(value, n) for n in sizes]


def _sound(value: Any) -> jax.Array:
    value = jnp.asarray(value, jnp.float32)
    return jnp.where((value >= 0) & (value < 1), value, jnp.nan)


Sparsity = float | jax.Array | Callable[[jax.Array], jax.Array]
