"""Analog memory cells as Gaussian channels."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._checks import numbers

# Programming and read noise of phase-change memory, in μS, for a conductance g in units of MAXIMUM:
# fits to a million devices (Joshi et al. 2020; Nandakumar et al. 2019), as in IBM's aihwkit.
MAXIMUM = 25.0
WRITE = (0.2635, 1.9650, -1.1731)  # c₀ + c₁g + c₂g²
READ = (0.0088, 0.65, 0.2)  # min(q₀ / g^q₁, q₂)
PULSE = 250e-9  # seconds of a read

Spread = Callable[[jax.Array], jax.Array]


class Cell(NamedTuple):
    """A memory cell: what is written into it, and what is read from it, are off by normal noise.

    Conductances are fractions of the largest one that can be programmed reliably.

    Attributes:
        write: Function `(conductance) -> standard deviation` of the programmed conductance around
            the wanted one, both in [0, 1] in units of the largest conductance.
        read: Function `(conductance) -> standard deviation` of one read around the programmed
            conductance, in the same units.
        maximum: Largest conductance, in microsiemens.
    """

    write: Spread
    read: Spread
    maximum: float = 1.0

    def variance(self, conductance: jax.Array) -> jax.Array:
        """Variance of one write and one read.

        Args:
            conductance: Wanted conductances in [0, 1], of any shape.

        Returns:
            Array of the same shape, in units of the squared largest conductance.
        """
        return self.write(conductance) ** 2 + self.read(conductance) ** 2

    def __repr__(self) -> str:
        """Returns the name of the function that built it."""
        return _text.by_maker(self)


def gaussian(spread: float, read: float = 0.0) -> Cell:
    """A cell whose noise is the same for all conductances.

    Args:
        spread: Standard deviation of a write, as a fraction of the range of conductances; 0 for a
            cell without it.
        read: Standard deviation of a read, likewise; 0 by default.

    Returns:
        A `Cell`; the same object for equal arguments.

    Raises:
        ValueError: A negative or infinite standard deviation.

    Example:
        >>> from fishleg_jax import storage
        >>> float(storage.gaussian(0.5).variance(0.3))
        0.25
    """
    return _gaussian(
        numbers.check_not_negative(spread, "spread"), numbers.check_not_negative(read, "read")
    )


@functools.cache
def _gaussian(spread: float, read: float) -> Cell:
    def write_spread(conductance):
        return jnp.full_like(conductance, spread)

    def read_spread(conductance):
        return jnp.full_like(conductance, read)

    return Cell(write_spread, read_spread)


def pcm(seconds: float = 1.0) -> Cell:
    """A cell of phase-change memory, with noise as measured on a million of them.

    For a conductance g in units of 25 μS, programming has a standard deviation of
    `0.2635 + 1.9650 g − 1.1731 g²` μS, and a read one of `g Q √log((t + τ) / 2τ)` with
    `Q = min(0.0088 / g^0.65, 0.2)` and pulses of τ = 250 ns: 1 to 5 % of the range together.  The
    drift of conductances is taken to be compensated for.

    Args:
        seconds: Time t between write and read, 1 by default; noise of a read grows with its
            logarithm.

    Returns:
        A `Cell`; the same object for equal arguments.

    Raises:
        ValueError: A time below one pulse.

    References:
        Joshi et al., Accurate deep neural network inference using computational phase-change
        memory, Nature Communications 11, 2020; Nandakumar et al., Phase-change memory models for
        deep learning training and inference, ICECS 2019; coefficients as in the documentation of
        IBM's aihwkit, "Inference and PCM statistical model".

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> jnp.sqrt(storage.pcm().variance(jnp.array([0.0, 0.5, 1.0]))).round(4)
        Array([0.0105, 0.0463, 0.0539], dtype=float32)
    """
    valid = lambda x: PULSE <= x < math.inf
    return _pcm(numbers.check_number(seconds, "seconds", valid, f"at least {PULSE} and finite"))


@functools.cache
def _pcm(seconds: float) -> Cell:
    growth = math.sqrt(math.log((seconds + PULSE) / (2 * PULSE)))

    def write_spread(conductance):
        constant, linear, square = (c / MAXIMUM for c in WRITE)
        return jnp.maximum(constant + (linear + square * conductance) * conductance, 0)

    def read_spread(conductance):
        # g · min(q₀ / g^q₁, q₂), without a division by zero
        noise = jnp.minimum(READ[0] * conductance ** (1 - READ[1]), READ[2] * conductance)
        return noise * growth

    return Cell(write_spread, read_spread, MAXIMUM)


def check_cell(cell: object) -> None:
    """Raises a ValueError for anything but a `Cell`."""
    if not isinstance(cell, Cell):
        raise ValueError(f"cell must be a Cell, such as flj.storage.pcm(), got {_text.shown(cell)}")
