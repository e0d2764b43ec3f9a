"""Number of weights to prune below every threshold, for all scopes and patterns.

The scopes `global` and `layer` take the floor of the sparsity times the weights.  `erk` and
densities by name share one total among the leaves; that total is exact.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers

SCOPES = ("global", "layer", "erk")
Scope = str | Mapping[str, float]
NEAR = 2e-6  # difference of equal sparsities: a traced one is read to six decimals
ALIKE = 1e-3  # difference of the sparsity that densities give and the one that is asked for
HALVINGS = 60  # of the interval in which ERK's common factor lies


class Thresholds(NamedTuple):
    """Weights below every threshold.

    Attributes:
        sizes: Number of weights.
        most: Number that can be pruned: fewer than all where a pattern leaves some dense.
        dimensions: Sum of the dimensions of the leaf, or of one of its layers.
        final: Number to prune in the end if densities are given by name; else None.
    """

    sizes: tuple[int, ...]
    most: tuple[int, ...]
    dimensions: tuple[int, ...]
    final: tuple[int, ...] | None


def number_to_prune(sparsity: float, weights: int) -> int:
    """`floor(sparsity · weights)` in decimal: 0.29 of 100 is 29, though 0.29 * 100 is 28.999…

    Args:
        sparsity: Fraction of zeros, in [0, 1).
        weights: Number of weights.

    Returns:
        Number of weights to prune.

    Raises:
        ValueError: The sparsity is not a number in [0, 1).

    Example:
        >>> number_to_prune(0.29, 100)
        29
    """
    numbers.check_number(sparsity, "sparsity", lambda x: 0 <= x < 1, "a number in [0, 1)")
    return math.floor(Fraction(str(sparsity)) * weights)


def check_scope(scope: Any) -> None:
    """Raises a ValueError for anything but a scope."""
    if isinstance(scope, Mapping) and scope:
        return
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(
            f"scope must be one of {', '.join(SCOPES)} or a mapping from expressions to densities, "
            f"got {_text.shown(scope)}"
        )


def by_name(
    densities: Mapping[str, float], names: Sequence[str], chosen: Sequence[bool]
) -> tuple[float, ...]:
    """Density of every leaf, of the first expression that matches it; 1 for the others.

    Args:
        densities: Fractions to keep, in (0, 1], by regular expressions over key paths.
        names: Key path of every leaf.
        chosen: Whether each leaf is prunable.

    Raises:
        ValueError: A density out of range, an expression that matches no leaf.
    """
    leaves, rules = [(name, None) for name in names], []
    for key, density in densities.items():
        if not numbers.is_number(density) or not 0 < density <= 1:
            raise ValueError(
                f"scope: a density must be in (0, 1], got {_text.shown(density)} for {key!r}"
            )
        matches = _tree.matches(key, leaves, "scope")
        if not any(match and yes for match, yes in zip(matches, chosen, strict=True)):
            raise ValueError(f"scope: {key!r} must match a prunable leaf, got only others")
        rules.append((matches, float(density)))
    return tuple(
        next((density for match, density in rules if match[i]), 1.0) if chosen[i] else 1.0
        for i in range(len(names))
    )


def exact_counts(groups: Any, sparsity: float, low: Sequence[Any] | None = None) -> list:
    """Number of weights to prune below every threshold at a sparsity.

    Args:
        groups: Leaves that are pruned, and weights that share a threshold, `Groups`.
        sparsity: Fraction of the prunable weights, a Python number in [0, 1).
        low: Numbers that are pruned already, which may be traced; None for none.
    """
    plain = [number_to_prune(sparsity, size) for size in groups.sizes]
    if groups.fully_patterned and sparsity >= of_all_groups(groups) - NEAR:
        return list(groups.sizes)  # every group, however many zeros there are
    if groups.scope in ("global", "layer"):
        return plain
    traced = low is not None and isinstance(sum(low), jax.core.Tracer)
    xp = jnp if traced else np
    total = number_to_prune(sparsity, groups.weights)
    found = _shared(groups.thresholds, total, sparsity, low, xp)
    return list(found) if traced else [int(n) for n in found]


def traced_counts(groups: Any, sparsity: jax.Array, plain: jax.Array, total: jax.Array, low: Any):
    """Number of weights to prune below every threshold at a sparsity that may be traced.

    Args:
        groups: Leaves that are pruned, and weights that share a threshold, `Groups`.
        sparsity: Fraction of the prunable weights, of shape ().
        plain: Floors of the sparsity times the weights below every threshold.
        total: Floor of the sparsity times all weights.
        low: Numbers that are pruned already.
    """
    if groups.scope not in ("global", "layer"):
        plain = _shared(groups.thresholds, total, sparsity, low, jnp)
    if groups.fully_patterned:
        every = jnp.asarray(groups.sizes, jnp.int32)
        plain = jnp.where(sparsity >= of_all_groups(groups) - NEAR, every, plain)
    return plain


def of_all_groups(groups: Any) -> float:
    """Sparsity once every group of n of m has its zeros; the pattern's own if leaves are apart."""
    if groups.scope not in ("global", "erk"):
        return groups.pattern.highest
    most = most_to_prune(groups)
    # never below the fraction, or its floor would be a weight less
    return min(math.nextafter(most / max(groups.weights, 1), 1), groups.pattern.highest)


def most_to_prune(groups: Any) -> int:
    """Number of weights of all leaves that can be pruned."""
    return sum(groups.most_to_prune(i) for i, yes in enumerate(groups.chosen) if yes)


def sparsity_of_densities(groups: Any) -> float:
    """Fraction of the prunable weights that densities by name prune."""
    return sum(groups.thresholds.final) / max(groups.weights, 1)


def _shared(thresholds: Thresholds, total: Any, sparsity: Any, low: Any, xp: Any) -> Any:
    """Shares a number of weights to prune among the thresholds, by ERK or by their densities."""
    sizes, most, dimensions, final = thresholds
    whole = np.int64 if xp is np else jnp.int32
    number = xp.asarray(sizes, whole)
    high = xp.asarray(most if final is None else final, whole)
    total = xp.minimum(xp.asarray(total, whole), sum(most if final is None else final))
    low = xp.zeros_like(number) if low is None else xp.stack(list(low)).astype(whole)
    if final is None:
        wanted = _erk(sizes, most, dimensions, total, xp)
    else:
        every = sum(final)
        # the end of the way is exact, whatever the rounding of the sparsity that asks for it
        end = sparsity >= every / max(sum(sizes), 1) - ALIKE
        total = xp.where(end, every, total)
        wanted = np.asarray(final, np.float64) * (total / max(every, 1))
    base = xp.floor(wanted + 1e-6).astype(whole)
    return _settled(base, total, low, xp.maximum(high, low), xp)


def _erk(sizes, most, dimensions, total, xp):
    """Numbers to prune by ERK: `kept = ε · dimensions`, within what can be kept, ε for the total.

    The sum of what is kept grows with ε, so halving an interval finds it whatever the bounds.
    """
    number, least = np.asarray(sizes, float), np.asarray(sizes, float) - np.asarray(most, float)
    scale = np.asarray(dimensions, float)
    number, least, scale = (xp.asarray(x) for x in (number, least, scale))
    kept = lambda factor: xp.clip(factor * scale, least, number)
    low, high = xp.zeros(()), xp.max(number / scale)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = xp.sum(kept(middle)) >= sum(sizes) - total
        low, high = xp.where(enough, low, middle), xp.where(enough, middle, high)
    return number - kept(high)


def _settled(base, total, low, high, xp):
    """Numbers near `base` and within bounds whose sum is the total, or as near as the bounds let.

    The first ones with room take what rounding leaves.
    """
    base = xp.clip(base, low, high)

    def taken(room, left):
        left = xp.maximum(left, 0)
        return xp.clip(left - (xp.cumsum(room) - room), 0, room).astype(base.dtype)

    missing = total - xp.sum(base)
    return base + taken(high - base, missing) - taken(base - low, -missing)


@functools.lru_cache(maxsize=256)
def thresholds_of(groups: Any) -> Thresholds:
    """Numbers of weights below every threshold of `Groups` with one threshold for each leaf.

    Raises:
        ValueError: A density below what the pattern keeps of a leaf.
    """
    sizes, most, dimensions, final = [], [], [], []
    for (leaf,) in groups.members:
        layers = groups.layers((leaf,))
        shape = groups.shapes[leaf] if layers is None else groups.shapes[leaf][1:]
        number = 1 if layers is None else layers
        size = groups.size(leaf) // max(number, 1)
        prunable = groups.most_to_prune(leaf) // max(number, 1)
        sizes += [size] * number
        most += [prunable] * number
        dimensions += [max(sum(shape), 1)] * number
        if groups.densities is not None:
            final += [_final(groups, leaf, size, prunable)] * number
    known = groups.densities is not None
    return Thresholds(*map(tuple, (sizes, most, dimensions)), tuple(final) if known else None)


def _final(groups: Any, leaf: int, size: int, prunable: int) -> int:
    density = groups.densities[leaf]
    count = math.floor((1 - Fraction(str(density))) * size)
    if groups.fully_patterned and abs(1 - density - groups.pattern.highest) < NEAR:
        return prunable
    if count > prunable:
        raise ValueError(
            f"scope: {groups.names[leaf]!r} can't have a density of {density:g}, because "
            f"{groups.pattern} keeps at least {1 - prunable / max(size, 1):.6g} of it"
        )
    return count
