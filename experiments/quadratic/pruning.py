"""A trained network whose training images are shared between curvature and a check of the loss."""

import argparse
import time
from typing import Any, NamedTuple

import jax
import numpy as np

import fishleg_jax as flj
from experiments.data import datasets
from experiments.estimates import methods
from experiments.estimates.fitting import fit
from experiments.models.cases import curvature_batches
from experiments.models.specs import Spec
from experiments.running import results

CALIBRATION = 1000  # most images: evaluating more would take most of the time


class Case(NamedTuple):
    """A network at a point, and its data in three parts that have no image in common.

    Attributes:
        args: the arguments, with `sparsity`, `scope`, `compensation` and `seed`.
        spec: the model.
        dense: the trained network.
        curvature: training images that the curvature sees.
        calibration: other training images, on which the loss is predicted and measured.
        test: test images, for accuracies.
        part: how the images of the curvature are divided among gradients.
    """

    args: argparse.Namespace
    spec: Spec
    dense: results.Dense
    curvature: datasets.Arrays
    calibration: datasets.Arrays
    test: datasets.Arrays
    part: methods.Share


class Fitted(NamedTuple):
    """The fitted estimate of a method.

    Attributes:
        estimator: the estimate.
        state: its state.
        batches: the data that it was fitted to.
        seconds: how long that took, with the compilation.
    """

    estimator: flj.InverseFisher
    state: Any
    batches: list[tuple]
    seconds: float


def divide(
    train: datasets.Arrays, examples: int, seed: int
) -> tuple[datasets.Arrays, datasets.Arrays]:
    """Random training images for the curvature, and others to check the loss on.

    Args:
        train: the training inputs and targets.
        examples: number of images for the curvature.
        seed: for the choice.
    """
    order = np.random.default_rng(seed).permutation(len(train[0]))
    ends = (order[:examples], order[examples : examples + CALIBRATION])
    return tuple(tuple(array[rows] for array in train) for rows in ends)


def make_estimator(
    method: str, spec: Spec, part: methods.Share, damping: float | None = None
) -> flj.InverseFisher:
    """The estimate of a method.

    Args:
        method: its name in `experiments.estimates.methods.METHODS`.
        spec: the model.
        part: how the images of the curvature are divided among gradients.
        damping: γ; None for the library's default.
    """
    return methods.make_estimator(method, spec.model, damping=damping, **part.settings)


def fitted(method: str, case: Case, damping: float | None = None) -> Fitted:
    """Fits a method to the images of the curvature.

    Args:
        method: its name in `experiments.estimates.methods.METHODS`.
        case: the network and its data.
        damping: γ; None for the library's default.
    """
    part, constants = case.part, case.dense.constants
    estimator = make_estimator(method, case.spec, part, damping)
    batches = curvature_batches(
        case.curvature,
        constants,
        examples=part.examples,
        batch_size=methods.batch_size(method, part, case.spec.batch),
        seed=case.args.seed,
        fill=False,
    )
    begin = time.perf_counter()
    key = jax.random.key(case.args.seed)
    state = fit(estimator, case.dense.params, batches, key=key, name=method)
    return Fitted(estimator, state, batches, time.perf_counter() - begin)


def prune(case: Case, estimate: Fitted) -> flj.Result:
    """Prunes the network once with a fitted estimate.

    Args:
        case: the network and its data.
        estimate: see `fitted`.

    Raises:
        FloatingPointError: the estimate or the pruned weights are not finite.
    """
    return flj.prune_one_shot(
        case.spec.model,
        case.dense.params,
        estimate.estimator,
        estimate.batches,
        sparsity=case.args.sparsity,
        scope=case.args.scope,
        compensation=getattr(flj.compensation, case.args.compensation)(),
        prunable=case.spec.prunable,
        stages=flj.Stages(state=estimate.state),
    )


def fields(case: Case) -> dict[str, Any]:
    """Fields shared by all objects of the json files."""
    return {
        "dataset": case.spec.dataset,
        "model": case.spec.name,
        "sparsity_target": case.args.sparsity,
        "seed": case.args.seed,
        "dense_accuracy": case.dense.accuracy,
        "dense_loss": case.dense.loss,
        "curvature_examples": case.part.examples,
        "settings": {
            "scope": case.args.scope,
            "compensation": case.args.compensation,
            "gradients": case.part.gradients,
            "examples_per_gradient": case.part.each,
            "prunable": results.prunable(case.spec),
        },
    }
