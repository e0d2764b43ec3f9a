"""Weights into cells and back: robust codings, noise of writes and reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _random, _text, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax._jit import is_traced
from fishleg_jax.storage.cells import Cell, check_cell, pcm

RANGES = ("leaf", "network")


class Coding(NamedTuple):
    """How weights become conductances.

    Attributes:
        signs: Whether signs are kept apart, as protected bits, so that a conductance is a magnitude
            and has the whole range for it; default True.  Otherwise the middle of the range is a
            weight of zero, and the noise of a weight is twice as large.
        zeros: Whether the positions of zeros are kept apart, as protected bits, so that zeros take
            no cells and stay exactly zero; default True.
        ranges: Weights that share a range, whose largest magnitude is the largest conductance:
            `leaf`, the default, or `network` for all of them.
    """

    signs: bool = True
    zeros: bool = True
    ranges: str = "leaf"


class Stored(NamedTuple):
    """Weights in cells, as `write` returns them; in units of the weights.

    Attributes:
        values: Mean of each weight's programmed conductances: its magnitude if signs are kept
            apart, the weight otherwise.
        spreads: Standard deviation of the mean of one read of each weight's cells.
        signs: Signs that were kept apart, int8; zero for zeros that were, too.  With neither, ones.
        floors: Lowest value of each leaf's range.
        ceilings: Highest value of each leaf's range.
        dtypes: Arrays of size 0 in the dtypes of the weights.
    """

    values: Any
    spreads: Any
    signs: Any
    floors: Any
    ceilings: Any
    dtypes: Any

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def check(cell: Any, coding: Any) -> None:
    """Raises a ValueError for an invalid cell or coding."""
    check_cell(cell)
    if not isinstance(coding, Coding):
        raise ValueError(f"coding must be a flj.storage.Coding, got {_text.shown(coding)}")
    numbers.check_flag(coding.signs, "coding.signs")
    numbers.check_flag(coding.zeros, "coding.zeros")
    if coding.ranges not in RANGES:
        raise ValueError(
            f"coding.ranges must be one of {', '.join(RANGES)}, got {_text.shown(coding.ranges)}"
        )


def check_params(params: Any) -> None:
    """Raises a ValueError unless all leaves are floating-point arrays, finite where known."""
    arrays.check_dtypes(params) if is_traced(params) else arrays.check_params(params)


def takes_cells(params: Any, coding: Coding) -> Any:
    """Which weights need cells: all, or those other than zero; booleans like the weights."""
    return jax.tree.map(lambda w: jnp.asarray(w) != 0 if coding.zeros else w == w, params)


def _tops(params: Any, coding: Coding) -> Any:
    """Largest magnitude of each leaf's range; 1 where all weights are zero."""
    tops = jax.tree.map(lambda w: jnp.max(jnp.abs(w), initial=0), params)
    if coding.ranges == "network":
        largest = jnp.max(jnp.stack(jax.tree.leaves(tops)))
        tops = jax.tree.map(lambda _: largest, tops)
    return jax.tree.map(lambda top: jnp.where(top > 0, top, 1), tops)


def _spread(function: Any, w: jax.Array, top: jax.Array, coding: Coding) -> jax.Array:
    """Standard deviation of one cell in units of the weights."""
    if coding.signs:
        return top * function(jnp.abs(w) / top)
    return 2 * top * function((w / top + 1) / 2)


def _spreads(params: Any, tops: Any, cell: Cell, coding: Coding) -> tuple[Any, Any]:
    """Standard deviations of a write and of a read of one cell for each weight."""

    def of(function):
        def leaf(w, top, needed):
            return jnp.where(needed, _spread(function, w, top, coding), 0)

        return jax.tree.map(leaf, params, tops, takes_cells(params, coding))

    return of(cell.write), of(cell.read)


def variances(params: Any, *, cell: Cell | None = None, coding: Coding | None = None) -> Any:
    """Variance of each weight if it is written to one cell, and read once.

    Args:
        params: Weights, any pytree of floating-point arrays.
        cell: Memory cell; `pcm()` by default.
        coding: Coding of the weights; by default `Coding()`, with protected signs and zeros and a
            range for each leaf.

    Returns:
        Pytree like the weights, in squared units of them, float32 or better; 0 for weights that
        take no cells.  Values at the ends of a range vary less, since reads are clipped to it.

    Raises:
        ValueError: Weights that are not finite floating-point arrays, an invalid cell or coding.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> storage.variances(jnp.array([0.0, 2.0]), cell=storage.gaussian(0.5))
        Array([0., 1.], dtype=float32)
    """
    cell, coding = pcm() if cell is None else cell, Coding() if coding is None else coding
    check(cell, coding)
    check_params(params)
    wide = _tree.widen(params)
    write_spread, read_spread = _spreads(wide, _tops(wide, coding), cell, coding)
    return jax.tree.map(lambda x, y: x**2 + y**2, write_spread, read_spread)


def write(
    params: Any,
    cells: Any,
    key: jax.Array,
    *,
    cell: Cell | None = None,
    coding: Coding | None = None,
) -> Stored:
    """Programs weights into cells, with the noise of programming; `jit`-compatible.

    The noise of n averaged cells is drawn as one normal number with a variance of σ²/n.

    Args:
        params: Weights, any pytree of floating-point arrays.
        cells: Number of cells for each weight: a whole number, or a pytree of integers like the
            weights, such as from `allot`.  At least 1 for weights that need one; others are
            ignored.
        key: Random key of the noise.
        cell: Memory cell; `pcm()` by default.
        coding: Coding of the weights; by default `Coding()`, with protected signs and zeros and a
            range for each leaf.

    Returns:
        A `Stored`, for `read`.

    Raises:
        ValueError: Weights that are not finite floating-point arrays, cells of another structure or
            type or too few of them, an invalid cell or coding.

    References:
        Isik et al., Neural network compression for noisy storage devices, ACM TECS 2023, whose
        protections of signs and zeros and ranges by layer these are in spirit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> weights = jnp.array([0.5, -1.0, 0.0])
        >>> stored = storage.write(weights, 3, jax.random.key(0))
        >>> storage.read(stored, jax.random.key(1)).round(1)
        Array([ 0.5, -1. ,  0. ], dtype=float32)
    """
    cell, coding = pcm() if cell is None else cell, Coding() if coding is None else coding
    check(cell, coding)
    check_params(params)
    cells = check_cells(params, cells, coding)
    wide = _tree.widen(params)
    tops, needed = _tops(wide, coding), takes_cells(wide, coding)
    spreads = [
        jax.tree.map(lambda s, n: s / jnp.sqrt(jnp.maximum(n, 1)).astype(s.dtype), spread, cells)
        for spread in _spreads(wide, tops, cell, coding)
    ]
    values = jax.tree.map(jnp.abs, wide) if coding.signs else wide
    signs = jax.tree.map(lambda w: jnp.sign(w) if coding.signs else jnp.ones_like(w), wide)
    # a zero that is not protected is read as a small positive number
    signs = jax.tree.map(
        lambda s, yes: jnp.where(yes, jnp.where(s == 0, 1, s), 0).astype(jnp.int8), signs, needed
    )
    return Stored(
        _with_noise(values, spreads[0], key),
        spreads[1],
        signs,
        jax.tree.map(lambda top: jnp.zeros_like(top) if coding.signs else -top, tops),
        tops,
        jax.tree.map(lambda w: jnp.zeros(0, jnp.result_type(w)), params),
    )


def read(stored: Stored, key: jax.Array) -> Any:
    """Reads weights from cells once, with the noise of a read; `jit`-compatible.

    Args:
        stored: Weights in cells, from `write`.
        key: Random key of the noise, another one than that of `write`.

    Returns:
        Weights, in the structure, shapes and dtypes of those that were written: each the mean over
        its cells, clipped to the range of its leaf, times its sign.

    Raises:
        ValueError: Something other than a `Stored`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> exact = storage.gaussian(0.0)
        >>> stored = storage.write(jnp.array([0.3, -1.0]), 1, jax.random.key(0), cell=exact)
        >>> storage.read(stored, jax.random.key(1))
        Array([ 0.3, -1. ], dtype=float32)
    """
    if not isinstance(stored, Stored):
        raise ValueError(f"stored must be a Stored, as write returns it, got {type(stored)}")
    noisy = _with_noise(stored.values, stored.spreads, key)

    def decoded(value, sign, low, high, dtype):
        return (sign * jnp.clip(value, low, high)).astype(dtype.dtype)

    return jax.tree.map(decoded, noisy, stored.signs, stored.floors, stored.ceilings, stored.dtypes)


def _with_noise(values: Any, spreads: Any, key: jax.Array) -> Any:
    leaves, tree = jax.tree.flatten(values)
    noise = tree.unflatten(_random.like(leaves, key))
    return jax.tree.map(lambda v, s, n: v + s * n, values, spreads, noise)


def check_cells(params: Any, cells: Any, coding: Coding) -> Any:
    """Returns the number of cells for each weight as a pytree of integers, or raises a ValueError.

    Args:
        params: Checked weights.
        cells: Whole number, or pytree of integers like the weights.
        coding: Checked coding.
    """
    if numbers.is_number(cells):
        number = numbers.check_count(cells, "cells")
        return jax.tree.map(lambda w: jnp.full(jnp.shape(w), number, jnp.int32), params)
    _tree.check_same(params, cells, "cells")
    needed = None if is_traced((params, cells)) else jax.tree.leaves(takes_cells(params, coding))
    for i, (name, leaf) in enumerate(_tree.named_leaves(cells)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            raise ValueError(
                f"cells: {name!r} must have an integer type, got {jnp.result_type(leaf)}"
            )
        if needed is not None and (np.asarray(leaf)[np.asarray(needed[i])] < 1).any():
            raise ValueError(f"cells: {name!r} must have at least 1 for every weight that is kept")
    return cells
