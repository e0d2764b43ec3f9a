"""Tables and figures of `experiments.gradual`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.models.specs import Spec
from experiments.report import plots, record, tables
from experiments.running import metrics

TITLES = {
    "accuracy": "test accuracy, %",
    "reconstruction_error": "reconstruction error",
    "loss": "test loss, nats",
    "seconds": "seconds",
}
DIGITS = {"accuracy": 2, "reconstruction_error": 3, "loss": 3, "seconds": 1}


def score_name(spec: Spec) -> str:
    """The field that has the quality of a network."""
    return "accuracy" if spec.mean is None else "reconstruction_error"


def show(rows: Sequence[dict], spec: Spec) -> str:
    """Tables of accuracy (or reconstruction error), loss and seconds: medians over seeds.

    Args:
        rows: the objects of `results.json`.
        spec: the model.
    """
    name = score_name(spec)
    shown = [
        tables.by_sparsity(rows, x, TITLES[x], lambda v, n=DIGITS[x]: tables.spread(v, n))
        for x in (name, "loss", "seconds")
    ]
    return "\n\n".join([f"{TITLES[name]}, before: {_before(rows, name)}", *shown])


def _before(rows: Sequence[dict], name: str) -> str:
    return tables.spread([row[f"start_{name}"] for row in rows])


def table(rows: Sequence[dict], spec: Spec, train: int, test: int) -> record.Table:
    """Accuracy (or reconstruction error) as a table for the pages of docs/.

    Args:
        rows: the objects of `results.json`.
        spec: the model.
        train: number of training examples.
        test: number of test examples.
    """
    name = score_name(spec)
    steps = rows[0]["settings"]["steps"]
    examples = f"{train:,} for {steps:,} steps of training, the curvature too; {test:,} to test"
    title = f"{TITLES[name]}, pruned in training"
    made = record.at_sparsities(rows, name, title, examples=examples, digits=DIGITS[name])
    return made._replace(note=f"{made.note} Before pruning {_before(rows, name)}.")


def draw(args: argparse.Namespace, spec: Spec, rows: Sequence[dict]) -> list[Path]:
    """The pictures; the curves are those of the first seed."""
    runs = {}
    for row in rows:
        if row["seed"] == args.seed[0]:
            told = metrics.load(args.out / row["metrics"])
            runs.setdefault(row["sparsity_target"], {})[row["method"]] = told
    field = score_name(spec)
    path, name = args.out / f"{field}_vs_sparsity.png", TITLES[field]
    return [
        plots.accuracy_vs_sparsity(path, rows, field=field, name=name, how="gradual"),
        plots.training(args.out / "training.png", runs),
    ]
