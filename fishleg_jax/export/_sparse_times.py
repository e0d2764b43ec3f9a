"""Measures sparse against dense products on the machine at hand."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text
from fishleg_jax._checks import numbers
from fishleg_jax._checks.arrays import check_untraced


class MatmulTimes(NamedTuple):
    """Seconds of one product of a batch with a kernel.

    Attributes:
        dense: Median seconds of `x @ kernel`.
        sparse: Median seconds with the transposed kernel in BCSR.
    """

    dense: float
    sparse: float

    def __repr__(self) -> str:
        """One line."""
        return _text.one_line(self)


_MEASURED: dict[tuple, MatmulTimes] = {}  # by shape, density, batch, dtype and platform


def measure_sparse_matmul(
    shape: tuple[int, int],
    density: float,
    batch: int,
    *,
    dtype: Any = jnp.float32,
    seconds: float = 0.1,
) -> MatmulTimes:
    """Measures whether a sparse kernel pays: BCSR against dense, alternately.

    Results are kept in memory, so that each shape, density, batch and dtype is measured once.

    Args:
        shape: Inputs and outputs of the kernel.
        density: Fraction of its weights that are not zero, in (0, 1]; rounded to hundredths.
        batch: Number of examples.
        dtype: Floating-point dtype of the kernel and the inputs, float32 by default.
        seconds: Seconds to measure for, without compilation; 0.1 by default.

    Returns:
        Medians, in seconds.

    Raises:
        ValueError: A shape other than two positive sizes, an invalid density, batch, dtype or time,
            or a call under jit.

    Example:
        >>> import fishleg_jax as flj
        >>> times = flj.export.measure_sparse_matmul((64, 32), 0.1, batch=8, seconds=0.01)
        >>> times.dense > 0 and times.sparse > 0
        True
    """
    sizes = tuple(shape) if np.iterable(shape) else ()
    if len(sizes) != 2 or not all(numbers.is_whole(n, 1) for n in sizes):
        raise ValueError(f"shape must be two sizes of at least 1, got {_text.shown(shape)}")
    density = numbers.check_number(density, "density", lambda x: 0 < x <= 1, "a number in (0, 1]")
    batch = numbers.check_count(batch, "batch", 1)
    dtype = _floating(dtype)
    numbers.check_positive(seconds, "seconds")
    check_untraced("measure first, and compile what uses the result", "measure_sparse_matmul")
    key = (*sizes, round(density, 2), batch, dtype.name, jax.default_backend())
    if key not in _MEASURED:
        _MEASURED[key] = _measure(sizes, density, batch, dtype, seconds)
    return _MEASURED[key]


def _floating(dtype: Any) -> Any:
    """Returns a floating-point dtype, or raises a ValueError."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be one of floating-point numbers, got {_text.shown(dtype)}")
    return found


def transposed_bcsr(kernel: Any) -> Any:
    """Transposed kernel in BCSR, with int32 indices."""
    from jax.experimental import sparse

    return sparse.BCSR.fromdense(jnp.asarray(np.asarray(kernel).T))


def sparse_product(x: Any, transposed: Any) -> Any:
    """Product `x @ kernel` with the transposed kernel in BCSR, for `x` of shape (examples, in)."""
    return (transposed @ x.T).T


def _measure(
    shape: tuple[int, int], density: float, batch: int, dtype: Any, seconds: float
) -> MatmulTimes:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape) * (rng.random(shape) < density)
    kernel, x = jnp.asarray(kernel, dtype), jnp.asarray(rng.normal(size=(batch, shape[0])), dtype)
    transposed = transposed_bcsr(kernel)
    runs: tuple[Callable, ...] = (
        jax.jit(lambda x: x @ kernel),
        jax.jit(lambda x: sparse_product(x, transposed)),
    )
    for run in runs:
        jax.block_until_ready(run(x))
    times: tuple[list[float], ...] = ([], [])
    end = time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < end:
        for run, found in zip(runs, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run(x))
            found.append(time.perf_counter() - begin)
    return MatmulTimes(*map(statistics.median, times))
