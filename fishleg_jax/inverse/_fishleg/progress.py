"""Whether learning still lowers the auxiliary loss, from samples that it has not learned from.

Every learning update measures the loss on fresh probes before it takes a step, so that the losses
themselves are held-out samples.  Two successive windows of them are compared.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 32  # updates


class Progress(NamedTuple):
    """Losses of the current window, and the mean of the one before.

    Attributes:
        number: Number of losses in the current window.
        total: Sum of these losses.
        squares: Sum of their squared differences from their mean.
        mean: Mean of the window before; the largest number if there is none.
        variance: Squared standard error of that mean.
        settled: Whether the last whole window was not below the one before by a standard error of
            the difference.
    """

    number: jax.Array  # shape=(), int32
    total: jax.Array  # shape=(), float
    squares: jax.Array  # shape=(), float
    mean: jax.Array  # shape=(), float
    variance: jax.Array  # shape=(), float
    settled: jax.Array  # shape=(), bool


def init(dtype: jnp.dtype) -> Progress:
    """Returns the record before any loss."""
    zero = lambda: jnp.zeros((), dtype)  # noqa: E731  # separate arrays, or they can't be donated
    return Progress(
        number=jnp.zeros((), jnp.int32),
        total=zero(),
        squares=zero(),
        mean=jnp.full((), jnp.finfo(dtype).max, dtype),  # finite: any window is below it
        variance=zero(),
        settled=jnp.array(False),
    )


def noted(progress: Progress, loss: jax.Array, counted: jax.Array) -> Progress:
    """Returns the record with one more loss.

    Args:
        progress: Record before.
        loss: Loss of a fresh sample.
        counted: Whether to count it; if False, the record is returned unchanged.
    """
    # Welford's update of mean and squares
    loss = jnp.where(counted, loss, 0)
    number = progress.number + counted
    before = progress.total / jnp.maximum(progress.number, 1)
    total = progress.total + loss
    mean = total / jnp.maximum(number, 1)
    squares = progress.squares + jnp.where(counted, (loss - before) * (loss - mean), 0)
    # the first loss differs from no mean
    squares = jnp.where(number == 1, 0, squares)
    full = number >= WINDOW
    variance = squares / (WINDOW - 1) / WINDOW
    fell = progress.mean - mean > jnp.sqrt(variance + progress.variance)
    return Progress(
        number=jnp.where(full, 0, number),
        total=jnp.where(full, 0, total),
        squares=jnp.where(full, 0, squares),
        mean=jnp.where(full, mean, progress.mean),
        variance=jnp.where(full, variance, progress.variance),
        settled=jnp.where(full, ~fell, progress.settled),
    )
