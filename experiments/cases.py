"""A trained network with its data, for the experiments that go through several models."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoints, data, files, training
from experiments.models import MODELS, Spec, as_batch


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
        data_dir: see `experiments.data.prepared`.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = MODELS[name]
    data.check(spec.dataset, data_dir)
    if spec.checkpoint:
        files.shared(spec.checkpoint)


def curvature_batches(
    train: data.Arrays,
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
        examples: how many are used, the same ones whatever the size of a batch.
        batch_size: how many are in a batch.
        seed: which ones are chosen.
        fill: whether those that do not fill a batch are left out; else the last one is smaller.
        beside: none of the examples is among those of a call with the same seed for this many.

    Returns:
        Batches as the library wants them.

    Raises:
        ValueError: there are not so many examples.
    """
    if examples + beside > len(train[0]):
        raise ValueError(
            f"{examples + beside} training images are wanted, and there are {len(train[0])}"
        )
    size = min(batch_size, examples)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(train[0]), beside or examples, replace=False)
    if beside:
        others = np.setdiff1d(np.arange(len(train[0])), chosen)
        chosen = rng.choice(others, examples, replace=False)
    used = examples // size * size if fill else examples
    rows = [chosen[begin : begin + size] for begin in range(0, used, size)]
    return [as_batch(jnp.asarray(train[0][r]), jnp.asarray(train[1][r]), constants) for r in rows]


def network(
    name: str,
    *,
    train_in: Path | None,
    data_dir: Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
) -> tuple[Any, Any, data.Arrays]:
    """A network at the checkpoint of the shared folder, or one that is trained here.

    Args:
        name: a name in `MODELS`.
        train_in: where the weights of a network without a checkpoint are kept once it is trained;
            None leaves it at its random start.
        data_dir: see `experiments.data.prepared`.
        seed: for the training.
        epochs: of the training; None for the model's own number.

    Returns:
        The parameters, the constants, and the training data.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = MODELS[name]
    train = data.load(spec.dataset, data_dir).train
    if spec.checkpoint:
        return *checkpoints.load(files.shared(spec.checkpoint), spec), train
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
