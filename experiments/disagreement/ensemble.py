"""Networks trained on random subsets, for memorisation and influence of training examples."""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import networks, training
from experiments.models.specs import Spec, as_batch, make_spec
from experiments.running import files

SHARE = 0.7  # of the training examples that a subset has, as in Feldman & Zhang
BATCH = 1000
KEYS = "correct", "test"  # arrays of a file: on training and on test images

# CIFAR-10: a network of 545,000 weights in place of ResNet-20, which takes hours a subset on a CPU
SMALL = make_spec(
    "cifar_cnn",
    networks.Cnn(),
    "cifar10",
    (32, 32, 3),
    epochs=8,
    train_batch=128,
    examples=8192,
    batch=128,
)


class Ensemble(NamedTuple):
    """Networks on random subsets of the training images.

    Attributes:
        correct: whether each network is right on each training image, (models, examples).
        members: whether each network was trained on each of them, of the same shape.
        test: whether each network is right on each test image, (models, tests); None if files of
            an earlier version, which lack it, were among those read.
    """

    correct: np.ndarray
    members: np.ndarray
    test: np.ndarray | None


@partial(jax.jit, static_argnames="model")
def _classes(model: flj.Model, params: Any, batch: tuple) -> jax.Array:
    return model.predict(params, batch[0], *batch[2:]).argmax(axis=-1)


def correct(spec: Spec, params: Any, constants: Any, data: datasets.Arrays) -> np.ndarray:
    """Whether a classifier is right, example by example."""
    parts = []
    for begin in range(0, len(data[0]), BATCH):
        inputs, labels = (x[begin : begin + BATCH] for x in data)
        found = _classes(spec.model, params, as_batch(inputs, labels, constants))
        parts.append(np.asarray(found) == labels)
    return np.concatenate(parts)


def subset(examples: int, number: int) -> np.ndarray:
    """Which examples the model of a number is trained on: booleans, seven in ten."""
    rng = np.random.default_rng([number, examples])
    chosen = rng.choice(examples, round(SHARE * examples), replace=False)
    return np.isin(np.arange(examples), chosen)


def trained(spec: Spec, split: datasets.Data, folder: Path, models: int, epochs: int) -> Ensemble:
    """An ensemble on random subsets whose models are kept in files.

    Args:
        spec: the network that is trained on the subsets.
        split: the data set.
        folder: where the results of each model are kept.
        models: number of models.
        epochs: of each training.
    """
    train, test = split
    right, on_test, members = [], [], []
    for number in tqdm(range(models), desc="networks on subsets", disable=None):
        path = folder / f"{spec.name}_{len(train[0])}_{epochs}epochs_{number}.npz"
        own = subset(len(train[0]), number)
        if not path.exists():
            part = tuple(x[own] for x in train)
            weights = training.train(spec, part, epochs=epochs, seed=number)
            found = {name: correct(spec, *weights, x) for name, x in zip(KEYS, split, strict=True)}
            files.write(path, lambda beside, found=found: np.savez(beside, **found))
        with np.load(path) as stored:
            right.append(stored[KEYS[0]])
            if KEYS[1] in stored:
                on_test.append(stored[KEYS[1]])
        members.append(own)
    if len(on_test) < models:
        print(
            f"no influence: {models - len(on_test)} of {models} networks in {folder} are kept "
            "without test images; remove their files to train them again",
            file=sys.stderr,
        )
    complete = np.array(on_test) if len(on_test) == models else None
    return Ensemble(np.array(right), np.array(members), complete)
