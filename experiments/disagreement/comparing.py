"""One pruning beside the dense network: an object of `results.json`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import fishleg_jax as flj
from experiments.arena.contestants import make_estimator
from experiments.data import datasets
from experiments.models import recalibration
from experiments.models.cases import curvature_batches
from experiments.models.specs import Spec, as_batch

METHODS = ("magnitude", "diagonal", "kfac", "woodfisher", "mfac", "fishleg")
FREE = ", label-free"  # behind the name of a method that sees the dense network's outputs
NAMES = (*METHODS, f"fishleg{FREE}")
BATCH = 500


class Case(NamedTuple):
    """A trained network, its data, and how strongly training examples are memorised.

    Attributes:
        spec: the model.
        params: its weights.
        constants: its constants; may be empty.
        split: the data set.
        memorisation: a score for every training example, NaN where it is unknown.
    """

    spec: Spec
    params: Any
    constants: Any
    split: datasets.Data
    memorisation: np.ndarray


def prune(
    case: Case, name: str, *, sparsity: float, examples: int, batch: int, stages: int, seed: int
) -> Any:
    """Prunes with a method's default call.

    Args:
        case: the network.
        name: of `NAMES`; label-free, the loss is against the dense network's own outputs.
        sparsity: fraction of the prunable weights.
        examples: number of training examples, the same ones for every method.
        batch: examples in a batch.
        stages: at most.
        seed: for their choice, and for the method's random numbers.

    Returns:
        The `Result`, and the constants that belong to it.
    """
    method, free, _ = name.partition(FREE)
    spec, model = case.spec, case.spec.model
    batches = curvature_batches(
        case.split.train, case.constants, examples=examples, batch_size=batch, seed=seed
    )
    if free:
        model, batches = flj.label_free(model, case.params, batches)
    estimator = make_estimator(method, spec._replace(model=model), examples)
    result = flj.prune_one_shot(
        model,
        case.params,
        estimator,
        batches,
        sparsity=sparsity,
        stages=flj.Stages(most=stages),
        prunable=spec.prunable,
        key=jax.random.key(seed),
    )
    constants = case.constants
    if constants:
        constants = recalibration.recalibrated(
            spec, result.params, constants, case.split.train, seed
        )
    return result, constants


def compare(case: Case, params: Any, constants: Any, *, train: bool) -> flj.Disagreement:
    """The dense network beside a pruned one, on test or on training examples."""
    inputs, labels = case.split.train if train else case.split.test
    batches = [
        as_batch(inputs[i : i + BATCH], labels[i : i + BATCH], case.constants)
        for i in range(0, len(inputs), BATCH)
    ]
    other = (_with_own_constants(case.spec.model.predict), (params, constants))
    scores = case.memorisation if train else None
    return flj.disagreement((case.spec.model, case.params), other, batches, memorisation=scores)


@functools.cache  # one function for all prunings, which compiles once
def _with_own_constants(predict: Callable[..., Any]) -> Callable[..., Any]:
    """A function of parameters and constants, which ignores the constants of batches."""

    def own(both, inputs, *_):
        params, constants = both
        return predict(params, inputs, *([constants] if constants else []))

    return own


def fields(test: flj.Disagreement, train: flj.Disagreement) -> dict[str, Any]:
    """Numbers of both comparisons, for `results.json`, with the positions that differ."""
    excess = train.memorised_excess or (None, None)
    return {
        "accuracy": 100 * test.accuracies[1],
        "dense_accuracy": 100 * test.accuracies[0],
        "mismatches": 100 * test.rate,
        "lost": test.lost,
        "gained": test.gained,
        "calibration": 100 * test.calibration[1],
        "dense_calibration": 100 * test.calibration[0],
        "test_examples": test.examples,
        "where": test.where().tolist(),
        "where_lost": test.where("lost").tolist(),
        "predicted": test.predictions[1][test.where()].tolist(),
        "by_class": [100 * x.rate for x in test.classes],
        "by_margin": [[x.low, x.high, 100 * x.rate] for x in test.margins],
        "train_mismatches": 100 * train.rate,
        "by_memorisation": [[x.low, x.high, x.examples, 100 * x.rate] for x in train.memorised],
        "memorised_excess": excess[0],
        "memorised_error": excess[1],
    }
