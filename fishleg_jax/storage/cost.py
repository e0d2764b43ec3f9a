"""Numbers of cells that stored weights take, with all that has to be kept beside them."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax._checks import numbers
from fishleg_jax.storage.cells import Cell, pcm
from fishleg_jax.storage.coding import Coding, check, check_cells, check_params, takes_cells
from fishleg_jax.storage.digital import Digital, digital

RANGE_BITS = 32  # of a range, a float


class Cost(NamedTuple):
    """Numbers of cells.

    Attributes:
        values: Cells of the weights themselves.
        signs: Cells of protected signs.
        positions: Cells of the positions of zeros, in an enumerative code: log₂ of the number of
            ways to choose them, leaf by leaf.
        ranges: Cells of the ranges, 32 bits each.
    """

    values: float
    signs: float
    positions: float
    ranges: float

    @property
    def total(self) -> float:
        """Number of all cells."""
        return self.values + self.signs + self.positions + self.ranges


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
        Cost(values=6.0, signs=0.5, positions=0.75, ranges=8.0)
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
        A `Cost` whose `signs` are 0, since they belong to the values.

    Raises:
        ValueError: Fewer than 2 bits, or weights that are not finite floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> exact = storage.digital(storage.gaussian(0.0))
        >>> storage.digital_cost(jnp.ones(4), storage=exact)
        Cost(values=8.0, signs=0.0, positions=0.0, ranges=8.0)
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
    """Bits for the positions of zeros, leaf by leaf: log₂ of the binomial, rounded up."""
    total = 0
    for leaf in needed:
        n, k = leaf.size, int(leaf.sum())
        nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.ceil(round(nats / math.log(2), 9))
    return total
