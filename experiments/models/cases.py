"""A trained network with its data, for the experiments that go through several models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data import datasets
from experiments.models import checkpoints, training
from experiments.models.specs import MODELS, Spec, as_batch
from experiments.running import files, processes


class Case(NamedTuple):
    """A network at a point, and training data.

    Attributes:
        spec: the model.
        params: its parameters.
        constants: its constants; may be empty.
        batches: training examples in batches of the model's usual size.
    """

    spec: Spec
    params: Any
    constants: Any
    batches: list[tuple]


def check(name: str, data_dir: Path | None = None) -> None:
    """Finds out, without reading them, whether a model's data and checkpoint are there.

    Args:
        name: a name in `MODELS`.
        data_dir: see `experiments.data.datasets.prepared`.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = MODELS[name]
    datasets.check(spec.dataset, data_dir)
    if spec.checkpoint:
        files.shared(spec.checkpoint)


def curvature_batches(
    train: datasets.Arrays,
    constants: Any,
    *,
    examples: int,
    batch_size: int,
    seed: int,
    fill: bool = True,
    beside: int = 0,
) -> list[tuple]:
    """Random training examples in batches of equal size.

    Args:
        train: the training inputs and targets.
        constants: the model's constants; may be empty.
        examples: number of examples, the same ones for every batch size.
        batch_size: examples in a batch.
        seed: which ones are chosen.
        fill: whether those that do not fill a batch are left out; else the last one is smaller, and
            batches of any size are good for several processes.
        beside: none of the examples is among those of a call with the same seed for this many.

    Returns:
        Batches as the library wants them.

    Raises:
        ValueError: there are too few examples.
    """
    rows = _choose(len(train[0]), beside or examples, seed)
    if beside:
        others = np.setdiff1d(np.arange(len(train[0])), rows)
        rows = others[_choose(len(others), examples, [seed, 1])]
    size = min(batch_size, examples)
    if fill:
        rows = rows[: examples // size * size]
    return _cut(train, constants, rows, size, uneven=not fill)


def stage_batches(
    train: datasets.Arrays,
    constants: Any,
    *,
    stages: int,
    examples: int,
    batch_size: int,
    seed: int,
    held_out: int = 0,
) -> list[tuple]:
    """Training examples for several stages, each seen again only when all were seen as often.

    Args:
        train: the training inputs and targets.
        constants: the model's constants; may be empty.
        stages: number of stages.
        examples: number of examples in each stage.
        batch_size: examples in a batch; the last one of a stage may be smaller.
        seed: which ones are chosen, and their order.
        held_out: number of examples that no stage may see: those of
            `curvature_batches(beside=)` for all that the stages may see,
            `min(stages · examples, what is left)`.

    Returns:
        Batches as the library wants them, equally many for each stage, one stage's after the other.

    Raises:
        ValueError: there are too few examples.
    """
    total, available = stages * examples, len(train[0]) - held_out
    rows = _choose(len(train[0]), min(total, available), seed)
    rounds = [rows]
    while len(rounds) * len(rows) < total:
        rounds.append(np.random.default_rng([seed, 2, len(rounds)]).permutation(rows))
    rows = np.concatenate(rounds)[:total].reshape(stages, examples)
    return [batch for own in rows for batch in _cut(train, constants, own, batch_size, True)]


def augmented(dataset: str, batches: Sequence[tuple], seed: int) -> list[tuple]:
    """Batches of images as training sees them, see `datasets.augmented`.

    Args:
        dataset: the name of the data set.
        batches: as the library wants them.
        seed: chooses shifts and flips.
    """
    rng = np.random.default_rng([seed, 3])

    def change(images: np.ndarray, part: tuple[int, slice]) -> np.ndarray:
        return datasets.augmented(dataset, images, rng, part)

    return [(processes.changed(inputs, change), *rest) for inputs, *rest in batches]


def _choose(available: int, examples: int, seed: int | list[int]) -> np.ndarray:
    if not 0 < examples <= available:
        raise ValueError(f"{examples} training images are wanted, and there are {available}")
    return np.random.default_rng(seed).choice(available, examples, replace=False)


def _cut(
    train: datasets.Arrays, constants: Any, rows: np.ndarray, size: int, uneven: bool
) -> list[tuple]:
    parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return [as_batch(*processes.read(train, r, uneven), constants) for r in parts]


def network(
    name: str,
    *,
    train_in: Path | None,
    checkpoint: Path | None = None,
    data_dir: Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
) -> tuple[Any, Any, datasets.Arrays]:
    """A network at the checkpoint of the shared folder, or one that is trained here.

    Args:
        name: a name in `MODELS`.
        train_in: where the weights of a network without a checkpoint are kept once it is trained;
            None leaves it at its random start.
        checkpoint: an npz file of weights; None for that of the shared folder, if there is one.
        data_dir: see `experiments.data.datasets.prepared`.
        seed: for the training.
        epochs: of the training; None for the model's own number.

    Returns:
        The parameters, the constants, and the training data.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = MODELS[name]
    train = datasets.load(spec.dataset, data_dir).train
    if checkpoint or spec.checkpoint:
        path = checkpoint or files.shared(spec.checkpoint)
        return *checkpoints.load(path, spec), train
    if train_in is None:
        return *jax.jit(spec.init)(jax.random.key(seed)), train
    length = "" if epochs is None else f"_{epochs}epochs"
    path = train_in / f"{name}{length}_seed{seed}.npz"
    return *training.trained(spec, train, path, epochs=epochs, seed=seed), train


def load(name: str, *, train_in: Path | None, data_dir: Path | None = None, seed: int = 0) -> Case:
    """A network, see `network`, with training examples in batches.

    Args:
        name: see `network`.
        train_in: see `network`.
        data_dir: see `network`.
        seed: for the training and for the choice of examples.

    Returns:
        The case.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = MODELS[name]
    params, constants, train = network(name, train_in=train_in, data_dir=data_dir, seed=seed)
    batches = curvature_batches(
        train, constants, examples=spec.examples, batch_size=spec.batch, seed=seed
    )
    return Case(spec, params, constants, batches)
