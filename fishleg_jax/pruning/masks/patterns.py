"""Patterns of sparsity: groups of weights that are pruned together, or n of m of them.

Each of these functions returns a value for the argument `pattern`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fishleg_jax import _text
from fishleg_jax._checks import numbers

MOST_SUBSETS = 1000  # sets of pruned weights that are compared in each group of n:m

Axis = int | Mapping[str, int]
# (key path, axis) or (key path, axis, number of indices of a unit along it)
Coupling = Sequence[tuple[str, int] | tuple[str, int, int]]


class Pattern(NamedTuple):
    """Groups of weights that live or die together; hashable, without arrays.

    Attributes:
        kind: `n_m`, `blocks` or `units`.
        keep: Number of weights that a pruned group keeps: n of n:m, else 0.
        sizes: Sizes of a group: (m,), the shape of a block, or the number of indices of a unit.
        axis: Axis of the groups, or pairs of an expression over key paths and an axis.
        couplings: Axes that units share: of each its (key path, axis, number of indices of a unit).
    """

    kind: str
    keep: int
    sizes: tuple[int, ...]
    axis: int | tuple[tuple[str, int], ...] | None
    couplings: tuple[tuple[tuple[str, int, int], ...], ...] = ()

    @property
    def highest(self) -> float:
        """Sparsity if every weight is in a group and every group is pruned."""
        return 1 - self.keep / self.sizes[0] if self.kind == "n_m" else 1.0

    def __repr__(self) -> str:
        """Returns the call that makes it, without an axis."""
        if self.kind == "n_m":
            return f"patterns.n_m({self.keep}, {self.sizes[0]})"
        if self.kind == "blocks":
            return f"patterns.blocks({self.sizes})"
        return f"patterns.units({'...' if self.couplings else ''})"


def n_m(n: int, m: int, axis: Axis | None = None) -> Pattern:
    """Keeps n of every m consecutive weights along the axis that is summed over.

    Of every m weights those are pruned whose removal, all together, is predicted to raise the loss
    least: all `C(m, n)` sets are compared, with the inverse Fisher of the m weights.

    Args:
        n: Number of weights to keep, at least 1.
        m: Number of weights in a group, more than n.
        axis: Axis of the groups, counted without the layers of a stacked leaf; or a mapping from
            regular expressions over key paths to axes, where the first match decides.  None, and
            leaves without a match: the last but one, which are the inputs of dense kernels (in,
            out) and the input channels of convolutions (height, width, in, out).

    Returns:
        A pattern.  If m does not divide an axis the remaining weights at its end stay dense; the
        report counts them.

    Raises:
        ValueError: Numbers that are not whole, n outside [1, m), too many sets to compare.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> scores = jnp.array([[4.0], [1.0], [3.0], [2.0], [9.0]])
        >>> pattern = flj.patterns.n_m(2, 4)
        >>> flj.make_masks(scores, pattern=pattern, prunable=".*")[:, 0].tolist()
        [True, False, True, False, True]
    """
    if not (numbers.is_whole(n, 1) and numbers.is_whole(m, 2) and n < m):
        raise ValueError(
            "n and m must be whole numbers with 1 <= n < m, got "
            f"n={_text.shown(n)}, m={_text.shown(m)}"
        )
    if math.comb(m, n) > MOST_SUBSETS:
        raise ValueError(
            f"n of m must have at most {MOST_SUBSETS} sets of weights to compare, got "
            f"{math.comb(m, n):,} of {n}:{m}"
        )
    return Pattern("n_m", int(n), (int(m),), -2 if axis is None else _axis(axis))


def blocks(shape: tuple[int, int]) -> Pattern:
    """Prunes whole blocks over the last two axes (in, out) of a leaf.

    Args:
        shape: Numbers of inputs and of outputs of a block, such as (4, 4).

    Returns:
        A pattern.  If they do not divide the axes the remaining weights at their ends stay dense;
        the report counts them.

    Raises:
        ValueError: A shape of other than two whole numbers, or a block of one weight.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> scores = jnp.array([[1.0, 2.0, 0.0], [0.0, 9.0, 5.0]])
        >>> flj.make_masks(scores, 0.4, pattern=flj.patterns.blocks((2, 1))).tolist()
        [[False, True, True], [False, True, True]]
    """
    fits = isinstance(shape, Sequence) and len(shape) == 2
    if not fits or not all(numbers.is_whole(x, 1) for x in shape) or math.prod(shape) < 2:
        raise ValueError(
            f"shape must be two whole numbers, such as (4, 4), got {_text.shown(shape)}"
        )
    return Pattern("blocks", 0, tuple(map(int, shape)), None)


def units(
    couplings: Sequence[Coupling] | None = None, *, axis: Axis = -1, size: int = 1
) -> Pattern:
    """Prunes whole units: output channels, neurons, heads.

    Args:
        couplings: Axes that units share, a list for every set of units: of each axis its
            `(key path, axis)`, or `(key path, axis, number of indices)` where a unit has several
            consecutive ones, as a head has.  Unit j is all prunable weights of these leaves at
            index j, and if an axis has k times as many indices, as in a kernel of queries, keys and
            values, at the j-th of each of its k parts; other prunable leaves stay dense.  What
            `flj.find_couplings` returns does as it is; its constants are passed over.  None: the
            units of a leaf are all of its weights at one index of its output axis.
        axis: Axis of the units without couplings, counted without the layers of a stacked leaf; or
            a mapping from regular expressions over key paths to axes, where the first match decides
            and other leaves take -1.
        size: Number of indices of a unit without couplings, 1 by default.

    Returns:
        A pattern.  Leaves that are not prunable, such as biases, keep what they have.

    Raises:
        ValueError: An entry of another form, or an axis that is named twice.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> scores = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[4.0], [0.0]])}
        >>> pattern = flj.patterns.units([[("a", 1), ("b", 0)]])
        >>> masks = flj.make_masks(scores, 0.5, pattern=pattern, prunable=".*")
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([[True, False]], [[True], [False]])
    """
    numbers.check_count(size, "size")
    if couplings is None:
        return Pattern("units", 0, (int(size),), _axis(axis))
    if axis != -1 or size != 1:
        raise ValueError(
            "axis and size must be left out with couplings, got "
            f"axis={_text.shown(axis)}, size={_text.shown(size)}"
        )
    if isinstance(couplings, str) or not isinstance(couplings, Sequence) or not couplings:
        raise ValueError(
            f"couplings must be a list of lists of (key path, axis), got {_text.shown(couplings)}"
        )
    coupled = tuple(tuple(map(_entry, coupling)) for coupling in couplings)
    seen = [entry[:2] for coupling in coupled for entry in coupling]
    twice = [entry for i, entry in enumerate(seen) if entry in seen[:i]]
    if twice or not all(coupled):
        found = f"{twice[0]} twice" if twice else "an empty coupling"
        raise ValueError(
            f"couplings must name every axis once, and none of them empty, got {found}"
        )
    return Pattern("units", 0, (1,), None, coupled)


def _entry(entry: tuple) -> tuple[str, int, int]:
    fits = isinstance(entry, (tuple, list)) and len(entry) in (2, 3) and isinstance(entry[0], str)
    if not fits or not all(_is_integer(x) for x in entry[1:]) or (entry[2:] and entry[2] < 1):
        raise ValueError(
            "couplings must consist of (key path, axis) or (key path, axis, number of indices), "
            f"got {_text.shown(entry)}"
        )
    return (entry[0], int(entry[1]), int(entry[2]) if entry[2:] else 1)


def _axis(axis: Axis) -> int | tuple[tuple[str, int], ...]:
    if _is_integer(axis):
        return int(axis)
    fits = isinstance(axis, Mapping) and all(
        isinstance(key, str) and _is_integer(value) for key, value in axis.items()
    )
    if not fits:
        raise ValueError(
            "axis must be a whole number or a mapping from expressions to these, got "
            f"{_text.shown(axis)}"
        )
    return tuple((key, int(value)) for key, value in axis.items())


def _is_integer(x: object) -> bool:
    return numbers.is_whole(x, -(2**31))


def check_pattern(pattern: object) -> None:
    """Raises a ValueError for anything but a pattern or None."""
    if pattern is not None and not isinstance(pattern, Pattern):
        raise ValueError(
            "pattern must be one of flj.patterns, such as flj.patterns.n_m(2, 4), got "
            f"{_text.shown(pattern)}"
        )


__all__ = ["Pattern", "blocks", "n_m", "units"]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
