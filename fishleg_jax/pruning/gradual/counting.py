"""How many weights a schedule asks to be pruned at a step, under `jit`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._checks import numbers
from fishleg_jax.pruning.masks.build import number_to_prune

PARTS = 1_000_000  # a traced sparsity is read to six decimals, which float32 holds
ROUNDING = 7e-8  # by which equal ones may differ under jit: the last digit of float32 below 1
FAR = 2**30  # a step after the end of any schedule
AHEAD = 100  # steps before the first weight goes from which curvature is of use


class Asked(NamedTuple):
    """What a schedule asks for at a step.

    Attributes:
        sparsity: as a number; NaN where it is none in [0, 1).
        counts: how many weights of every group.
        flat: whether it asks for no more up to the next regular mask update; of an array, whether
            it stands still, or is the first.
        soon: whether it asks for anything within the next `AHEAD` steps, or may.
        final: whether it will never ask for more, as far as is known.
    """

    sparsity: jax.Array  # shape=(), float32
    counts: jax.Array  # shape=(groups,), int32
    flat: jax.Array  # shape=(), bool
    soon: jax.Array  # shape=(), bool
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
    parts = _parts(sparsity)
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
        before: what was asked for at the step before; NaN where there was nothing.
    """
    if is_number(sparsity):
        value = jnp.asarray(float(sparsity), jnp.float32)
        yes = jnp.array(True)
        return Asked(value, _exact(sparsity, sizes), yes, yes, yes)
    if not callable(sparsity):
        value = _sound(sparsity)
        # the first may be the only one; what rises by less than a millionth may rise yet
        flat = (jnp.abs(value - before) <= ROUNDING) | jnp.isnan(before)
        return Asked(value, _floors(value, sizes), flat, jnp.array(True), jnp.array(False))
    value = _sound(sparsity(step))
    now, after, soon, last = (
        _parts(_sound(x))
        for x in (value, *map(sparsity, (ahead, step + AHEAD, jnp.full_like(step, FAR))))
    )
    counts, flat = _floors(value, sizes), after == now
    final = getattr(sparsity, "final", None)
    if is_number(final):
        counts = jnp.where(now >= _parts(float(final)), _exact(final, sizes), counts)
    return Asked(value, counts, flat, soon > 0, flat & (now >= last))


def is_number(x: Any) -> bool:
    """Whether it is a Python or NumPy number, known before anything is traced."""
    return numbers.is_number(x) and not isinstance(x, (np.ndarray, jax.Array))


def _parts(sparsity: Any) -> jax.Array:
    """A sparsity in whole millionths; two that are equal may differ by rounding under `jit`."""
    parts = jnp.round(jnp.nan_to_num(jnp.asarray(sparsity)) * PARTS).astype(jnp.int32)
    return jnp.clip(parts, 0, PARTS - 1)


def _exact(sparsity: Any, sizes: Sequence[int]) -> jax.Array:
    return jnp.asarray([number_to_prune(sparsity, n) for n in sizes], jnp.int32)


def _floors(value: jax.Array, sizes: Sequence[int]) -> jax.Array:
    return jnp.stack([floor_share(value, n) for n in sizes])


def _sound(value: Any) -> jax.Array:
    value = jnp.asarray(value, jnp.float32)
    return jnp.where((value >= 0) & (value < 1), value, jnp.nan)


Sparsity = float | jax.Array | Callable[[jax.Array], jax.Array | float]
