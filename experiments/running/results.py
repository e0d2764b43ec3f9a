"""The objects of a `results.json`: made from a pruned network, kept in a file, found again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import recalibration, training
from experiments.models.specs import Spec
from experiments.running import files


class Dense(NamedTuple):
    """A trained network and how good it is: accuracy in percent, loss in nats per example."""

    params: Any
    constants: Any
    accuracy: float
    loss: float


def evaluated(spec: Spec, split: datasets.Data, params: Any, constants: Any) -> Dense:
    """A trained network with its accuracy and loss on the test examples, see `measure`."""
    return Dense(params, constants, *measure(spec, params, split.test, constants))


def measure(spec: Spec, params: Any, data: datasets.Arrays, constants: Any) -> tuple[float, float]:
    """Accuracy in percent (of an auto-encoder the squared error an example), and loss in nats."""
    return training.evaluate(spec.model, params, data, constants, spec.mean)


def measured(state: Any) -> dict[str, float]:
    """The quantities that a fitted state reports; only the learned estimate has a loss."""
    names = ("damping", "auxiliary_loss", "relative_residual")
    return {name: float(getattr(state, name)) for name in names if hasattr(state, name)}


def prunable(spec: Spec) -> str:
    """In words, which weights of a model are pruned."""
    return spec.prunable or "leaves with two or more dimensions"


def made(
    result: flj.Result,
    spec: Spec,
    dense: Dense,
    split: datasets.Data,
    *,
    settings: Mapping[str, Any],
    **fields: Any,
) -> dict[str, Any]:
    """An object for `results.json`: evaluates a pruned network.

    Of one with batch norm `accuracy` and `loss` are those with the statistics as stored;
    `recalibrated_accuracy` and `recalibrated_loss` have them recomputed on `recalibrated_on`
    training images.

    Args:
        result: the pruned network.
        spec: the model.
        dense: the network before.
        split: the data set.
        settings: how it was pruned.
        **fields: further fields: the method, the sparsity wanted, the seed, seconds and so on.
    """
    accuracy, loss = measure(spec, result.params, split.test, dense.constants)
    recalibrated = {}
    if dense.constants:
        constants = recalibration.recalibrated(
            spec, result.params, dense.constants, split.train, fields["seed"]
        )
        again = measure(spec, result.params, split.test, constants)
        recalibrated = {
            "recalibrated_accuracy": again[0],
            "recalibrated_loss": again[1],
            "recalibrated_on": min(recalibration.EXAMPLES, len(split.train[0])),
        }
    return {
        **fields,
        "dataset": spec.dataset,
        "model": spec.name,
        "sparsity": flj.sparsity(result.params, spec.prunable),
        "accuracy": accuracy,
        "dense_accuracy": dense.accuracy,
        "loss": loss,
        "dense_loss": dense.loss,
        **recalibrated,
        "settings": {**settings, "prunable_weights": result.report.total.weights},
    }


def fingerprint(tree: Any) -> str:
    """Sixteen hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def load(path: Path) -> list[dict]:
    """The objects of a file; none where there is no file.

    Args:
        path: a `results.json`.

    Raises:
        ValueError: it holds something else.
    """
    try:
        rows = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as results: {error}") from error
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("settings"), dict) for row in rows
    )
    if not whole:
        raise ValueError(f"{path} is no list of results: move it away, or choose another --out")
    return rows


def add(path: Path, rows: Sequence[dict]) -> Path:
    """Adds objects to a file, which is written whole.

    What others have added in the meantime stays in it.

    Args:
        path: a `results.json`.
        rows: the objects.
    """
    return files.write_json(path, [*load(path), *rows])


def find(rows: Sequence[dict], **wanted: Any) -> dict | None:
    """The latest of those objects that have the fields wanted.

    Args:
        rows: objects of a `results.json`.
        **wanted: fields and their values; of `settings` an object may have more than are wanted.

    Returns:
        The object, or None.
    """
    settings = wanted.pop("settings", {})
    for row in reversed(rows):
        if _has(row, wanted) and _has(row["settings"], settings):
            return row
    return None


def _has(row: Mapping, wanted: Mapping) -> bool:
    # an absent field counts as None
    return all(row.get(name) == value for name, value in wanted.items())
