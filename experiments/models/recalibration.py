"""Batch-norm statistics that fit a pruned network, from training images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data import datasets
from experiments.models.cases import augmented, curvature_batches
from experiments.models.networks import MOMENTUM
from experiments.models.specs import Spec
from experiments.models.training import applied_in_training

EXAMPLES, BATCH = 2000, 500


@partial(jax.jit, static_argnames="spec")
def _statistics(spec: Spec, params: Any, constants: Any, inputs: jax.Array) -> Any:
    """The means and variances of one batch, of every layer behind layers that use them."""
    # of a running average that starts at zero, what one batch adds
    zero = jax.tree.map(jnp.zeros_like, constants)
    _, new = applied_in_training(spec, params, zero, inputs)
    return jax.tree.map(lambda x: x / (1 - MOMENTUM), new)


def recalibrate(spec: Spec) -> Callable[[Any, Sequence[tuple]], Any]:
    """Makes the function that recomputes batch-norm statistics, for `flj.Stages(recalibrate=)`.

    Args:
        spec: a model with batch-norm statistics for constants.

    Returns:
        A function `(params, batches) -> constants`: averages over batches, by their numbers of
        examples.
    """

    def constants_of(params: Any, batches: Sequence[tuple]) -> Any:
        parts = [_statistics(spec, params, batch[2], batch[0]) for batch in batches]
        return averaged(parts, [len(batch[0]) for batch in batches])

    return constants_of


def averaged(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The statistics of several batches, by their numbers of examples."""
    shares = [size / sum(sizes) for size in sizes]
    return jax.tree.map(lambda *xs: sum(s * x for s, x in zip(shares, xs, strict=True)), *parts)


def recalibrated(spec: Spec, params: Any, constants: Any, train: datasets.Arrays, seed: int) -> Any:
    """The statistics of a pruned network on `EXAMPLES` random training images.

    They are shifted and flipped like those that the statistics as stored are from, which plain
    images would not give even for dense weights.

    Args:
        spec: a model with batch-norm statistics for constants.
        params: its weights.
        constants: statistics of its dense weights, for their shapes.
        train: the training images.
        seed: which of them are chosen, and how they are shifted and flipped.
    """
    examples = min(EXAMPLES, len(train[0]))
    batches = curvature_batches(
        train, constants, examples=examples, batch_size=BATCH, seed=seed, fill=False
    )
    return recalibrate(spec)(params, augmented(spec.dataset, batches, seed))
