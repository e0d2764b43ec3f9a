"""Paired comparisons of losses, example by example."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fishleg_jax._devices import axis


def mean_and_error(
    batches: Sequence[jax.Array], axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean of a number of each example, and its standard error.

    Args:
        batches: Numbers of the examples, batch by batch; those of this device.
        axis_name: Named axis of devices, each with as many examples; None for one device.

    Returns:
        Two scalars; the error is infinite for a single example.
    """
    here = sum(x.size for x in batches)
    number = here * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    mean = axis.mean(sum(map(jnp.sum, batches)) / here, axis_name)
    variance = axis.mean(sum(jnp.sum((x - mean) ** 2) for x in batches) / here, axis_name)
    if number < 2:
        return mean, jnp.full_like(mean, jnp.inf)
    return mean, jnp.sqrt(variance / (number - 1))


def better(
    margin: float,
    losses: Sequence[jax.Array],
    than: Sequence[jax.Array],
    axis_name: str | None = None,
) -> jax.Array:
    """Whether losses are lower than others by standard errors of the paired difference.

    Args:
        margin: Number of standard errors.
        losses: Losses of the examples, batch by batch.
        than: Losses of the same examples to compare with.
        axis_name: Named axis of devices; None for one device.
    """
    differences = [y - x for x, y in zip(losses, than, strict=True)]
    mean, error = mean_and_error(differences, axis_name)
    return mean > margin * error
