"""Numbers of cells that stored weights take, with all that has to be kept beside them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax._checks import numbers
from fishleg_jax.storage.allotment import equal
from fishleg_jax.storage.cells import Cell, pcm
from fishleg_jax.storage.coding import Coding, check, check_cells, check_params, takes_cells
from fishleg_jax.storage.digital import Digital, digital

RANGE_BITS = 32  # of a range, a float
NUMBER_BITS = 32  # of a number of cells, where one that weights have is named


class Cost(NamedTuple):
    """Numbers of cells.

    Attributes:
        values: Cells of the weights themselves.
        signs: Cells of protected signs.
        positions: Cells of the positions of zeros, in an enumerative code: log₂ of the number of
            ways to choose them, leaf by leaf.
        ranges: Cells of the ranges, 32 bits each.
        numbers: Cells of the numbers of cells, without which nothing can be read: 32 bits for each
            number that occurs in a leaf, and an enumerative code of which weights have it, or which
            rows, where whole rows have the same.  32 bits in all for equal allotment.
    """

    values: float
    signs: float
    positions: float
    ranges: float
    numbers: float = 0.0

    @property
    def total(self) -> float:
        """Number of all cells."""
        return sum(self)


def cost(
    params: Any, cells: Any, *, cell: Cell | None = None, coding: Coding | None = None
) -> Cost:
    """Counts the cells of weights in analog storage; what is protected is stored digitally.

    Args:
        params: Weights, any pytree of floating-point arrays.
        cells: Number of cells for each weight, a whole number or a pytree of integers like the
            weights.
        cell: Memory cell; `pcm()` by default.  Protected bits are in cells of the same kind.
        coding: Coding of the weights; `Coding()` by default.

    Returns:
        A `Cost`.

    Raises:
        ValueError: Arguments that `write` rejects.

    References:
        Cover, Enumerative source encoding, IEEE Transactions on Information Theory 19, 1973.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> weights, exact = jnp.array([0.0, 1.0, -2.0, 0.0]), storage.gaussian(0.0)
        >>> storage.cost(weights, 3, cell=exact)  # 2 signs; 6 ways for 2 of 4; 4 bits a cell
        Cost(values=6.0, signs=0.5, positions=0.75, ranges=8.0, numbers=8.0)
    """
    cell, coding = pcm() if cell is None else cell, Coding() if coding is None else coding
    check(cell, coding)
    check_params(params)
    cells = check_cells(params, cells, coding)
    per_bit = digital(cell).cells_per_bit
    needed = [np.asarray(x) for x in jax.tree.leaves(takes_cells(params, coding))]
    pairs = zip(needed, jax.tree.leaves(cells), strict=True)
    values = sum(float(np.asarray(n, float)[yes].sum()) for yes, n in pairs)
    kept = sum(int(x.sum()) for x in needed)
    ranges = len(needed) if coding.ranges == "leaf" else 1
    return Cost(
        values,
        kept * per_bit if coding.signs else 0.0,
        _position_bits(needed) * per_bit if coding.zeros else 0.0,
        ranges * RANGE_BITS * per_bit,
        _number_bits(params, cells, needed, coding) * per_bit,
    )


def digital_cost(
    params: Any, bits: int = 8, *, storage: Digital | None = None, zeros: bool = True
) -> Cost:
    """Counts the cells of weights in digital storage, with its error correction.

    Args:
        params: Weights, any pytree of floating-point arrays.
        bits: Number of bits of a weight, 8 by default, its sign among them.
        storage: Digital storage; `digital()` by default, in cells of phase-change memory.
        zeros: Whether positions of zeros are stored in place of zeros; default True.

    Returns:
        A `Cost` whose `signs` are 0, since they belong to the values, and so are its `numbers`.

    Raises:
        ValueError: Fewer than 2 bits, or weights that are not finite floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> exact = storage.digital(storage.gaussian(0.0))
        >>> storage.digital_cost(jnp.ones(4), storage=exact)
        Cost(values=8.0, signs=0.0, positions=0.0, ranges=8.0, numbers=0.0)
    """
    bits = numbers.check_count(bits, "bits", 2)
    check_params(params)
    numbers.check_flag(zeros, "zeros")
    per_bit = (digital() if storage is None else storage).cells_per_bit
    needed = [np.asarray(x) for x in jax.tree.leaves(takes_cells(params, Coding(zeros=zeros)))]
    return Cost(
        sum(int(x.sum()) for x in needed) * bits * per_bit,
        0.0,
        _position_bits(needed) * per_bit if zeros else 0.0,
        len(needed) * RANGE_BITS * per_bit,
    )


def _position_bits(needed: list[np.ndarray]) -> int:
    """Bits for the positions of zeros, leaf by leaf."""
    return sum(_ways_bits([leaf.size - int(leaf.sum()), int(leaf.sum())]) for leaf in needed)


def _number_bits(params: Any, cells: Any, needed: list[np.ndarray], coding: Coding) -> int:
    """Bits for the numbers of cells of the weights that need any."""
    numbers_of = [np.asarray(n) for n in jax.tree.leaves(cells)]
    total = sum(int(n[yes].sum()) for n, yes in zip(numbers_of, needed, strict=True))
    if total == 0:
        return 0
    same = jax.tree.leaves(equal(params, total, coding=coding))
    if all((n == m)[yes].all() for n, m, yes in zip(numbers_of, same, needed, strict=True)):
        return NUMBER_BITS
    found = 0
    for n, yes in zip(numbers_of, needed, strict=True):
        for axis in reversed(range(n.ndim)):  # rows whose weights all have the same number
            top = np.where(yes, n, 0).max(axis=axis, keepdims=True, initial=0)
            if (n == top)[yes].all():
                n, yes = top, yes.any(axis=axis, keepdims=True)
        counts = np.unique(n[yes], return_counts=True)[1]
        found += len(counts) * NUMBER_BITS + _ways_bits(counts)
    return found


def _ways_bits(counts: Sequence[int]) -> int:
    """Bits for one of the ways to arrange things of several kinds: log₂ of the multinomial."""
    nats = math.lgamma(sum(counts) + 1) - sum(math.lgamma(k + 1) for k in counts)
    return math.ceil(round(nats / math.log(2), 9))
