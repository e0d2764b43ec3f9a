"""Networks before and after pruning."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import cases, recalibration, resizing
from experiments.models.specs import MODELS, Spec

NETWORKS = {"digits": "cnn", "resnet20": "resnet20"}
METHODS = ("magnitude", "fishleg")
HALF = 0.5  # of the operations, that the network with fewer units keeps
EXAMPLES = 2048  # training examples for the curvature


class Subject(NamedTuple):
    """A network before and after pruning.

    Attributes:
        name: a name in `NETWORKS`.
        dense: function `(params, inputs) -> outputs` with the statistics of the dense network.
        pruned: the same with those of the pruned one.
        dense_params: parameters before.
        params: parameters after, with zeros.
        masks: which of them are kept.
        sparsity: fraction of the prunable weights that is zero.
        test: inputs and labels.
        small: function `(params, inputs) -> outputs` of the network with fewer units.
        small_params: its parameters, physically smaller.
        share: operations of that network over those of the dense one.
    """

    name: str
    dense: Callable[[Any, Any], Any]
    pruned: Callable[[Any, Any], Any]
    dense_params: Any
    params: Any
    masks: Any
    sparsity: float
    test: datasets.Arrays
    small: Callable[[Any, Any], Any]
    small_params: Any
    share: float


def make(
    name: str, *, method: str, sparsity: float, examples: int, seed: int, out: Path
) -> Subject:
    """Trains or reads a network, and prunes it in one shot.

    Args:
        name: a name in `NETWORKS`.
        method: of the pruning; magnitude has no compensation, FishLeg the library's defaults in one
            stage.
        sparsity: of the prunable weights.
        examples: test examples to measure the accuracy on, at most.
        seed: for the training, the choice of examples and the fit.
        out: where the weights of a network without a checkpoint are kept.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = MODELS[NETWORKS[name]]
    params, constants, train = cases.network(spec.name, train_in=out, seed=seed)
    inputs, labels = datasets.load(spec.dataset).test
    batches = cases.curvature_batches(
        train,
        constants,
        examples=min(EXAMPLES, spec.examples),
        batch_size=spec.batch,
        seed=seed,
    )
    if method == "magnitude":
        estimator, options = flj.inverse.identity(), {"compensation": flj.compensation.none()}
    else:
        estimator, options = flj.inverse.fishleg(spec.model), {}
    result = flj.prune_one_shot(
        spec.model,
        params,
        estimator,
        batches,
        sparsity=sparsity,
        prunable=spec.prunable,
        stages=1,
        key=jax.random.key(seed),
        **options,
    )
    after = constants
    if constants:
        after = recalibration.recalibrated(spec, result.params, constants, train, seed)
    small = fewer_units(spec, params, constants, train, seed)
    return Subject(
        name,
        partial(_predict, spec.model, constants),
        partial(_predict, spec.model, after),
        params,
        result.params,
        result.masks,
        flj.sparsity(result.params, spec.prunable),
        (inputs[:examples], labels[:examples]),
        *small,
    )


def fewer_units(
    spec: Spec, params: Any, constants: Any, train: datasets.Arrays, seed: int
) -> tuple[Callable[[Any, Any], Any], Any, float]:
    """The network with half of its operations: whole units go, those of the smallest weights.

    Batch norm is recomputed afterwards, and nothing is trained.

    Returns:
        The function, its parameters, and its operations over those of the dense network.
    """

    def network(params: Any, inputs: Any, *constants: Any) -> Any:
        with resizing.sizes_of_params():
            return spec.model.predict(params, inputs, *constants)

    inputs = train[0][:8]
    given = {"constants": constants} if constants else {}
    squares = jax.tree.map(jnp.square, params)
    whole = flj.compact(network, params, None, inputs, **given).report.flops[0]
    goal = flj.targets.flops(HALF * whole)
    masks = flj.choose_units(network, params, squares, goal, inputs, multiple_of=8, **given)
    small = flj.compact(network, params, masks, inputs, **given)
    after = small.constants
    if constants:
        with resizing.sizes_of_params():
            after = recalibration.recalibrated(spec, small.params, after, train, seed)
    function = partial(_predict, spec.model._replace(predict=network), after)
    return function, small.params, small.report.flops[1] / whole


def _predict(model: flj.Model, constants: Any, params: Any, inputs: Any) -> Any:
    return model.predict(params, inputs, *([constants] if constants else []))
