"""Digital storage in the same cells: levels, and an error correction that makes it safe."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax.storage.cells import Cell, check_cell, pcm
from fishleg_jax.storage.coding import check_params

LEVELS = (2, 4, 8, 16)


class Digital(NamedTuple):
    """Digital storage in multi-level cells.

    Attributes:
        levels: Number of levels of a cell.
        bit_error: Probability that a bit is read wrong, before the error correction.
        corrected: Number of wrong bits that a code word may have.
        data_bits: Number of bits of data in a code word.
        word_bits: Number of bits of a code word.
        cells_per_bit: Number of cells for a bit of data, with its share of the error correction.
    """

    levels: int
    bit_error: float
    corrected: int
    data_bits: int
    word_bits: int
    cells_per_bit: float


def digital(cell: Cell | None = None, *, failure: float = 1e-15, order: int = 10) -> Digital:
    """Chooses the digital storage that takes the fewest cells for a bit.

    A cell has 2, 4, 8 or 16 evenly spaced levels with Gray code, so that a read that falls to the
    neighbouring level is one wrong bit.  Code words of `2^order − 1` bits of a binary BCH code
    correct t wrong bits with at most `order · t` bits of parity; t is the smallest number for which
    a word fails as seldom as asked.

    Args:
        cell: Memory cell; `pcm()` by default.
        failure: Largest probability that a word has more wrong bits than can be corrected, 1e-15 by
            default.
        order: Order m of the code, whose words have 2^m − 1 bits; 10 by default.

    Returns:
        A `Digital`.

    Raises:
        ValueError: An invalid cell or number, or a cell so noisy that no code of this order is
            safe.

    References:
        Lin & Costello, Error control coding, 2004, section 6.1.

    Example:
        >>> from fishleg_jax import storage
        >>> storage.digital(storage.gaussian(0.0)).cells_per_bit
        0.25
        >>> storage.digital(storage.pcm()).levels
        4
    """
    cell = pcm() if cell is None else cell
    check_cell(cell)
    numbers.check_number(failure, "failure", lambda x: 0 < x < 1, "in (0, 1)")
    order = numbers.check_count(order, "order", 3)
    options = [_with_levels(cell, levels, float(failure), order) for levels in LEVELS]
    sound = [option for option in options if option is not None]
    if not sound:
        raise ValueError(f"cell is too noisy for a code of order {order}, got {_text.shown(cell)}")
    return min(sound, key=lambda option: option.cells_per_bit)


def _with_levels(cell: Cell, levels: int, failure: float, order: int) -> Digital | None:
    """Storage with cells of `levels` levels; None if no code of this order is safe."""
    places = [i / (levels - 1) for i in range(levels)]
    half = 0.5 / (levels - 1)
    wrong = 0.0
    for i, place in enumerate(places):
        spread = math.sqrt(float(cell.variance(jnp.asarray(place))))
        tail = 0.5 * math.erfc(half / (spread * math.sqrt(2))) if spread else 0.0
        wrong += tail * (2 - (i in (0, levels - 1))) / levels
    bits = levels.bit_length() - 1
    bit_error, word = wrong / bits, 2**order - 1
    corrected = _correctable(bit_error, word, failure)
    data = word - order * corrected
    if data <= 0:
        return None
    return Digital(levels, bit_error, corrected, data, word, word / (data * bits))


def _correctable(error: float, word: int, failure: float) -> int:
    """Smallest t for which a word has more than t wrong bits as seldom as asked."""
    if error == 0:
        return 0
    terms = [
        math.exp(
            math.lgamma(word + 1)
            - math.lgamma(k + 1)
            - math.lgamma(word - k + 1)
            + k * math.log(error)
            + (word - k) * math.log1p(-error)
        )
        for k in range(word + 1)
    ]
    tail = 0.0
    for k in range(word, -1, -1):  # from the smallest terms on
        tail += terms[k]
        if tail > failure:
            return k
    return 0


def quantise(params: Any, bits: int = 8) -> Any:
    """Rounds weights to integers of a few bits times a scale for each leaf, as in digital storage.

    Args:
        params: Weights, any pytree of floating-point arrays.
        bits: Number of bits of a weight, 8 by default: integers from −(2^(bits − 1) − 1) to
            2^(bits − 1) − 1.

    Returns:
        Pytree like the weights, in their dtypes; zeros stay zero.

    Raises:
        ValueError: Fewer than 2 bits, or weights that are not finite floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> storage.quantise(jnp.array([0.1, 0.9, -1.0]), bits=2)
        Array([ 0.,  1., -1.], dtype=float32)
    """
    bits = numbers.check_count(bits, "bits", 2)
    check_params(params)
    return jax.tree.map(functools.partial(_rounded, 2 ** (bits - 1) - 1), params)


def _rounded(highest: int, w: jax.Array) -> jax.Array:
    wide = _tree.widen(w)
    top = jnp.max(jnp.abs(wide), initial=0)
    scale = jnp.where(top > 0, top, 1) / highest
    return (jnp.round(wide / scale) * scale).astype(jnp.result_type(w))
