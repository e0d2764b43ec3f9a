"""Accuracies of networks that are read from noisy cells."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import cases, recalibration, training
from experiments.models.specs import Spec
from fishleg_jax import storage

# Axes along which an allotment by curvature has one number of cells; none of its own if equal.
SHARED = {"by weight": None, "by row": -1}
ALLOTMENTS = ("equal", *SHARED)
CURVATURES = ("noisy", "exact")
DRAWS = 4  # of the noise, at least, that the Fisher is a mean over
CODINGS = {
    "protected signs and zeros, a range for each leaf": storage.Coding(),
    "signs not protected": storage.Coding(signs=False),
    "zeros not protected": storage.Coding(zeros=False),
    "one range for the network": storage.Coding(ranges="network"),
}


class Network(NamedTuple):
    """A network whose weights are to be stored.

    Attributes:
        name: `dense` or `pruned`.
        params: its weights.
        constants: its constants, which are not stored in cells; may be empty.
        batches: training batches for the Fisher.
        test: the test examples that accuracies are measured on.
        fishers: diagonals of the Fisher that were made, by what they were made for.
    """

    name: str
    params: Any
    constants: Any
    batches: Sequence[tuple]
    test: datasets.Arrays
    fishers: dict[Any, Any]

    @property
    def weights(self) -> int:
        """Number of weights that take cells, if zeros are protected."""
        return sum(int((w != 0).sum()) for w in jax.tree.leaves(self.params))


def fisher_of(
    spec: Spec,
    network: Network,
    each: float,
    cell: storage.Cell,
    coding: storage.Coding,
    curvature: str,
    seed: int,
) -> Any:
    """The diagonal of the Fisher, from labels that the network draws.

    Args:
        spec: the model.
        network: its weights, and the batches.
        each: cells for each weight on average.
        cell: the memory cell.
        coding: of the weights.
        curvature: a name in `CURVATURES`: at weights as they are read, or as they are.
        seed: for the labels and the noise.
    """
    at = curvature if curvature == "exact" else (each, cell, coding)
    if at not in network.fishers:
        estimator, key = flj.inverse.diagonal(spec.model), jax.random.key(seed)
        batches = network.batches
        if curvature == "exact":
            state = flj.fit(estimator, network.params, batches, key=key)
            found = estimator.fisher_diagonal(state, network.params)
        else:
            cells = cells_of(network, each, coding)
            batches = batches * -(-DRAWS // len(batches))
            found = storage.fisher_under_noise(
                estimator, network.params, batches, cells, key=key, cell=cell, coding=coding
            )
        network.fishers[at] = found
    return network.fishers[at]


def made(
    spec: Spec,
    params: Any,
    constants: Any,
    split: datasets.Data,
    *,
    sparsity: float | None,
    examples: int,
    stages: int,
    test: int,
    seed: int,
) -> Network:
    """The dense network, or the one that FishLeg's default call prunes.

    Args:
        spec: the model.
        params: the trained weights.
        constants: the constants that belong to them; may be empty.
        split: the data set.
        sparsity: fraction of the prunable weights; None for the dense network.
        examples: training examples for the pruning and for the Fisher.
        stages: of the pruning, at most.
        test: test examples to measure accuracies on, at most.
        seed: for the choice of examples, the pruning and the Fisher.
    """
    train = split.train
    batches = cases.curvature_batches(
        train, constants, examples=examples, batch_size=min(spec.batch, 128), seed=seed
    )
    if sparsity is not None:
        params = flj.prune_one_shot(
            spec.model,
            params,
            flj.inverse.fishleg(spec.model),
            batches,
            sparsity=sparsity,
            stages=flj.Stages(most=stages),
            prunable=spec.prunable,
            key=jax.random.key(seed),
        ).params
        if constants:
            constants = recalibration.recalibrated(spec, params, constants, train, seed)
            batches = [(*batch[:2], constants) for batch in batches]
    name = "dense" if sparsity is None else "pruned"
    return Network(name, params, constants, batches, tuple(x[:test] for x in split.test), {})


@partial(jax.jit, static_argnames=("cell", "coding"))
def _drawn(params: Any, cells: Any, key: jax.Array, cell: Any, coding: Any) -> Any:
    write, read = jax.random.split(key)
    return storage.read(storage.write(params, cells, write, cell=cell, coding=coding), read)


def _number(network: Network, each: float, coding: storage.Coding) -> int:
    """Cells for all weights, from an average for those that take any."""
    if coding.zeros:
        return int(each * network.weights)
    return int(each * sum(w.size for w in jax.tree.leaves(network.params)))


def cells_of(network: Network, each: float, coding: storage.Coding) -> Any:
    """The same number of cells for each weight that takes any."""
    return storage.equal(network.params, _number(network, each, coding), coding=coding)


def accuracies(
    spec: Spec,
    network: Network,
    allotment: str,
    each: float,
    *,
    cell: storage.Cell,
    coding: storage.Coding,
    curvature: str,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Test accuracies of a network after a write and a read, for several draws of the noise.

    Args:
        spec: the model.
        network: its weights and the diagonal of the Fisher.
        allotment: a name in `ALLOTMENTS`.
        each: cells for each weight on average.
        cell: the memory cell.
        coding: of the weights.
        curvature: a name in `CURVATURES`.
        draws: number of draws.
        seed: of the noise.

    Returns:
        Fields for `results.json`: accuracies in percent and losses in nats, draw by draw, the
        expected rise of the loss, and the numbers of cells.
    """
    fisher = fisher_of(spec, network, each, cell, coding, curvature, seed)
    if allotment == "equal":
        cells = cells_of(network, each, coding)
    else:
        number = _number(network, each, coding)
        shared = SHARED[allotment]
        cells = storage.allot(
            fisher, network.params, cells=number, cell=cell, coding=coding, shared=shared
        )
    found = []
    for key in jax.random.split(jax.random.key(seed), draws):
        params = _drawn(network.params, cells, key, cell, coding)
        found.append(training.evaluate(spec.model, params, network.test, network.constants))
    cost = storage.cost(network.params, cells, cell=cell, coding=coding)
    expected = storage.expected_rise(fisher, network.params, cells, cell=cell, coding=coding)
    return {
        "accuracies": [x for x, _ in found],
        "losses": [x for _, x in found],
        "expected_rise": expected,
        "cells": cost.values,
        "total_cells": cost.total,
        "most_cells": max(int(n.max()) for n in jax.tree.leaves(cells)),
    }


def digital(spec: Spec, network: Network, cell: storage.Cell, bits: int) -> dict[str, Any]:
    """The same network in digital storage in cells of the same kind, free of errors."""
    found = storage.digital(cell)
    params = storage.quantise(network.params, bits)
    accuracy, loss = training.evaluate(spec.model, params, network.test, network.constants)
    cost = storage.digital_cost(network.params, bits, storage=found)
    return {
        "accuracies": [accuracy],
        "losses": [loss],
        "cells": cost.values,
        "total_cells": cost.total,
        "levels": found.levels,
        "bit_error": found.bit_error,
        "corrected": found.corrected,
        "cells_per_bit": found.cells_per_bit,
    }


class Curve(NamedTuple):
    """Accuracies against cells.

    Attributes:
        cells: numbers of cells, rising.
        accuracies: `(cells, draws)`.
    """

    cells: Sequence[float]
    accuracies: np.ndarray


def needed(cells: Sequence[float], accuracy: np.ndarray, wanted: float) -> float | None:
    """Cells at which a mean accuracy is reached, between those that were tried.

    Args:
        cells: numbers of cells, rising.
        accuracy: mean accuracies.
        wanted: the accuracy.

    Returns:
        The number, interpolated on a logarithmic axis; None where it is not reached for good.
    """
    above = np.asarray(accuracy) >= wanted
    if not above[-1]:
        return None
    # from there on all are above
    first = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
    if first == 0:
        return float(cells[0])
    low, high = accuracy[first - 1], accuracy[first]
    share = (wanted - low) / (high - low)
    logs = np.log(cells[first - 1]), np.log(cells[first])
    return float(np.exp(logs[0] + share * (logs[1] - logs[0])))


def ratio(ours: Curve, theirs: Curve, wanted: float, seed: int = 0) -> dict[str, Any]:
    """Cells of one allotment over those of another, at equal accuracy.

    Args:
        ours: the allotment in the numerator.
        theirs: the other one.
        wanted: the accuracy.
        seed: of the bootstrap over draws.

    Returns:
        Cells both ways, their ratio and its 95 % interval; None where an accuracy is not reached.
    """
    rng = np.random.default_rng(seed)

    def once(columns):
        both = [
            needed(curve.cells, curve.accuracies[:, own].mean(axis=1), wanted)
            for curve, own in zip((ours, theirs), columns, strict=True)
        ]
        return *both, None if None in both else both[0] / both[1]

    draws = [curve.accuracies.shape[1] for curve in (ours, theirs)]
    one, other, middle = once([np.arange(n) for n in draws])
    found = [once([rng.integers(0, n, n) for n in draws])[2] for _ in range(1000)]
    ratios = [x for x in found if x is not None]
    low, high = np.percentile(ratios, [2.5, 97.5]) if len(ratios) >= 950 else (None, None)
    return {"ours": one, "theirs": other, "ratio": middle, "low": low, "high": high}
