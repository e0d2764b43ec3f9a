"""Tables and figures of `experiments.gradual`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.models.specs import Spec
from experiments.report import plots, record, tables
from experiments.running import metrics


def score_name(spec: Spec) -> str:
    """The field that has the quality of a network."""
    return "accuracy" if spec.mean is None else "reconstruction_error"


def show(rows: Sequence[dict], spec: Spec) -> str:
    """Tables of accuracy (or reconstruction error), loss and seconds: medians over seeds.

    Args:
        rows: the objects of `results.json`.
        spec: the model.
    """
    titles = {
        score_name(spec): "test accuracy, %" if spec.mean is None else "reconstruction error",
        "loss": "test loss, nats",
        "seconds": "seconds",
    }
    digits = {"accuracy": 2, "reconstruction_error": 3, "loss": 3, "seconds": 1}
    shown = [
        tables.by_sparsity(rows, field, title, lambda v, n=digits[field]: tables.spread(v, n))
        for field, title in titles.items()
    ]
    before = tables.spread([row[f"start_{score_name(spec)}"] for row in rows])
    return "\n\n".join([f"{titles[score_name(spec)]}, before: {before}", *shown])


def table(rows: Sequence[dict], spec: Spec, train: int, test: int) -> record.Table:
    """Accuracy (or reconstruction error) as a table for the pages of docs/.

    Args:
        rows: the objects of `results.json`.
        spec: the model.
        train: number of training examples.
        test: number of test examples.
    """
    name = score_name(spec)
    title = "test accuracy, %" if name == "accuracy" else "reconstruction error"
    before = tables.spread([row[f"start_{name}"] for row in rows])
    steps = rows[0]["settings"]["steps"]
    examples = f"{train:,} for {steps:,} steps of training, the curvature too; {test:,} to test"
    digits = 2 if name == "accuracy" else 3
    made = record.at_sparsities(
        rows, name, f"{title}, pruned in training", examples=examples, digits=digits
    )
    return made._replace(note=f"{made.note} Before pruning {before}.")


def draw(args: argparse.Namespace, spec: Spec, rows: Sequence[dict]) -> list[Path]:
    """The pictures; the curves are those of the first seed."""
    runs = {}
    for row in rows:
        if row["seed"] == args.seed[0]:
            told = metrics.load(args.out / row["metrics"])
            runs.setdefault(row["sparsity_target"], {})[row["method"]] = told
    field = score_name(spec)
    name = "test accuracy, %" if spec.mean is None else "reconstruction error"
    return [
        plots.accuracy_vs_sparsity(
            args.out / f"{field}_vs_sparsity.png", rows, field=field, name=name, how="gradual"
        ),
        plots.training(args.out / "training.png", runs),
    ]
