"""Batches of data: inputs, targets and constants."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Batch(NamedTuple):
    """A batch of data; a bare tuple `(inputs, targets)` or `(inputs, targets, constants)` also is.

    Attributes:
        inputs: Pytree of arrays whose leading axis counts the examples.
        targets: Labels, a pytree of arrays with the same leading axis; None for unlabelled data.
        constants: Arrays that are not trained, such as batch-norm statistics, for a model whose
            `predict` takes them; None for a model whose `predict` does not.

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
    """Takes a batch apart into its inputs, its targets (or None) and a tuple of its constants."""
    inputs, *rest = batch
    constants = tuple(rest[1:])
    if isinstance(batch, Batch) and batch.constants is None:
        constants = ()
    return inputs, (rest[0] if rest else None), constants


def plain(batch: Sequence[Any]) -> tuple[Any, ...]:
    """A batch as a bare tuple, so that all ways to write one share a compilation."""
    inputs, targets, constants = split_batch(batch)
    return (inputs, targets, *constants)


def with_constants(batches: Sequence[BatchLike], constants: Any | None) -> Sequence[BatchLike]:
    """Batches with other constants; None leaves them as they are."""
    if constants is None:
        return batches
    named = [isinstance(batch, Batch) for batch in batches]
    replaced = [(*batch[:2], constants) for batch in batches]
    return [Batch(*b) if yes else b for b, yes in zip(replaced, named, strict=True)]


def number_of_examples(batch: BatchLike) -> int:
    """The length of the leading axis of a batch's inputs."""
    return jax.tree.leaves(batch[0])[0].shape[0]
