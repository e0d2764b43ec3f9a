"""Batches of data: inputs, targets and constants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Batch(NamedTuple):
    """A batch of data; bare tuples `(inputs, targets[, constants])` are accepted as well.

    Attributes:
        inputs: Pytree of arrays with a leading axis of examples.
        targets: Labels, a pytree of arrays with the same leading axis; None for unlabelled data.
        constants: Non-trainable arrays, such as batch-norm statistics, for a model whose `predict`
            takes them; None for other models.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.Batch(jnp.ones((8, 2)), jnp.ones(8)).inputs.shape
        (8, 2)
    """

    inputs: Any
    targets: Any = None
    constants: Any = None


BatchLike = tuple[Any, ...]  # a `Batch`, or a bare tuple


def split_batch(batch: BatchLike) -> tuple[Any, Any, tuple]:
    """Splits a batch into inputs, targets (or None) and a tuple of constants (maybe empty)."""
    inputs, *rest = batch
    constants = tuple(rest[1:])
    if isinstance(batch, Batch) and batch.constants is None:
        constants = ()
    return inputs, (rest[0] if rest else None), constants


def plain(batch: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a batch as a bare tuple, so that all spellings share a compilation."""
    inputs, targets, constants = split_batch(batch)
    return (inputs, targets, *constants)


def with_constants(batches: Sequence[BatchLike], constants: Any | None) -> Sequence[BatchLike]:
    """Replaces the constants of batches; None leaves them unchanged."""
    if constants is None:
        return batches
    return [
        batch._replace(constants=constants) if isinstance(batch, Batch) else (*batch[:2], constants)
        for batch in batches
    ]


def number_of_examples(batch: BatchLike) -> int:
    """Number of examples: the length of the leading axis of a batch's inputs."""
    return jax.tree.leaves(batch[0])[0].shape[0]
