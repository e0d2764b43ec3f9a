"""Number of weights that a schedule requests to prune at a step, under `jit`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._checks import numbers
from fishleg_jax.pruning.masks.build import number_to_prune

PARTS = 1_000_000  # a traced sparsity is read to six decimals, which float32 holds
ROUNDING = 7e-8  # difference of equal ones under jit: the last digit of float32 below 1
FAR = 2**30  # a step after the end of any schedule
AHEAD = 100  # steps before the first weight is pruned from which curvature is useful


class ScheduleRequest(NamedTuple):
    """Sparsity and counts that a schedule requests at a step.

    Attributes:
        sparsity: Requested sparsity; NaN if it is not in [0, 1).
        counts: Number of weights to prune in every group.
        flat: Whether the sparsity does not rise up to the next regular mask update; for an array,
            whether it stays the same, or is the first.
        soon: Whether any pruning is requested within the next `AHEAD` steps, or may be.
        final: Whether the sparsity will never rise again, as far as is known.
    """

    sparsity: jax.Array  # shape=(), float32
    counts: jax.Array  # shape=(groups,), int32
    flat: jax.Array  # shape=(), bool
    soon: jax.Array  # shape=(), bool
    final: jax.Array  # shape=(), bool


def floor_share(sparsity: Any, weights: int) -> jax.Array:
    """`floor(sparsity · weights)` in whole numbers, for a sparsity read to six decimals.

    In floating point 0.95 of 100 may be 94.99999.

    Args:
        sparsity: Scalar in [0, 1), may be traced.
        weights: Number of weights, fewer than 2³¹.

    Returns:
        A whole number, int32.

    Example:
        >>> floor_share(jnp.float32(0.29), 100)
        Array(29, dtype=int32)
    """
    parts = _parts(sparsity)
    # in two digits of base 1000: the product itself overflows int32
    whole, rest = divmod(weights, PARTS)
    high, low = (parts // 1000) * rest, (parts % 1000) * rest
    carry = ((high % 1000) * 1000 + low % PARTS) // PARTS
    return parts * whole + high // 1000 + low // PARTS + carry


class Counts(NamedTuple):
    """Functions from a sparsity to the number of weights to prune in every group.

    Attributes:
        exact: Function of a Python number, whose counts are exact in decimal.
        traced: Function of an array, which is read to six decimals.
    """

    exact: Callable[[float], jax.Array]
    traced: Callable[[jax.Array], jax.Array]


def request_at(
    sparsity: Any,
    sizes: Sequence[int],
    step: jax.Array,
    ahead: jax.Array,
    before: jax.Array,
    counts: Counts | None = None,
) -> ScheduleRequest:
    """Sparsity and counts that a number, an array or a schedule requests at a step.

    Args:
        sparsity: Python or NumPy number, for exact counts; an array, traced or not; or a function
            of the step.  If the function has an attribute `final`, a number, the counts of that are
            exact, too.
        sizes: Number of weights of each group.
        step: Number of the step; the first is 1.
        ahead: Number of the next regular mask update after it.
        before: Sparsity requested at the step before; NaN if there was none.
        counts: Counts of a pattern, or of shared densities; None for a share of each group.
    """
    if counts is None:
        counts = Counts(partial(_exact, sizes=sizes), partial(_floors, sizes=sizes))
    if is_number(sparsity):
        value = jnp.asarray(float(sparsity), jnp.float32)
        yes = jnp.array(True)
        return ScheduleRequest(value, counts.exact(sparsity), yes, yes, yes)
    if not callable(sparsity):
        value = _sound(sparsity)
        # the first may be the only one; a rise by less than a millionth may still go on
        flat = (jnp.abs(value - before) <= ROUNDING) | jnp.isnan(before)
        return ScheduleRequest(value, counts.traced(value), flat, jnp.array(True), jnp.array(False))
    value = _sound(sparsity(step))
    now, after, soon, last = (
        _parts(_sound(x))
        for x in (value, *map(sparsity, (ahead, step + AHEAD, jnp.full_like(step, FAR))))
    )
    found, flat = counts.traced(value), after == now
    final = getattr(sparsity, "final", None)
    if is_number(final):
        found = jnp.where(now >= _parts(float(final)), counts.exact(final), found)
    return ScheduleRequest(value, found, flat, soon > 0, flat & (now >= last))


def is_number(x: Any) -> bool:
    """Whether it is a Python or NumPy number, known before anything is traced."""
    return numbers.is_number(x) and not isinstance(x, (np.ndarray, jax.Array))


def _parts(sparsity: Any) -> jax.Array:
    """Sparsity in whole millionths; two that are equal may differ by rounding under `jit`."""
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
