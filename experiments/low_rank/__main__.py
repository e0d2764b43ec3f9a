"""Decomposes the kernels of networks in the metric of the Fisher beside plain decompositions.

    python -m experiments.low_rank
    python -m experiments.low_rank --networks resnet20,autoencoder --out results/low_rank

Every network is cut to the same share of its kernels' weights: by the SVD in the metric of the
Fisher's Kronecker factors (`fisher`) or a plain one (`plain`), with ranks by one `global` threshold
or `equal` shares in every kernel; plain ones also by `energy`, and by the continuous `search`.
Convolutions take one form of factors or, side by side, several.
Accuracy (for auto-encoders the squared error) and loss are those of test examples, before and after
training on for one epoch at a tenth of the learning rate.

Writes `results.json`, an object for each run, and `low_rank.png` into `--out`, and prints medians
over seeds with their range.  The same command goes on after it was stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from experiments.data import datasets
from experiments.low_rank.decomposing import METHODS, decomposed
from experiments.models import checkpoints, training
from experiments.models.specs import MODELS
from experiments.report import curves, record
from experiments.running import arguments, files, results
from experiments.running.arguments import at_least, one_of, seed, share
from experiments.running.runner import Runner

NETWORKS = ("cnn", "mlp", "mlpnet", "resnet20", "autoencoder")
FORMS = ("channel", "spatial", "tucker2")
HELD = 128  # examples whose gradients are held at a time, unless a gradient has more


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(
        "experiments.low_rank", "Decompose kernels in the metric of the Fisher, and plainly."
    )
    option = partial(arguments.option, parser)
    option("--networks", one_of(NETWORKS), ["cnn", "mlp"], several=True)
    option("--methods", one_of(METHODS), list(METHODS), several=True)
    option("--shares", share, [0.25, 0.15], "share of the kernels' weights to keep", several=True)
    option("--convolutions", one_of(FORMS), ["channel"], "forms of convolutions", several=True)
    option("--seeds", seed, [0], several=True)
    option("--examples", at_least(16), 1024, "training examples for the Fisher")
    option("--examples-per-gradient", at_least(1), 1, "divides the batch")
    option("--epochs", at_least(0), 1, "of training on")
    parser.add_argument("--data-dir", type=Path, help="where TensorFlow Datasets has its data")
    option("--out", Path, Path("results/low_rank"))
    record.add_option(parser)
    return parser


def _rows(args: argparse.Namespace, name: str, runner: Runner) -> list[dict]:
    """All results of one network."""
    spec = MODELS[name]
    split = datasets.load(spec.dataset, args.data_dir)
    rows = []
    for own_seed in args.seeds:
        if spec.checkpoint:
            weights = checkpoints.load(files.shared(spec.checkpoint), spec)
        else:
            path = args.out / f"{name}_seed{own_seed}.npz"
            weights = training.trained(spec, split.train, path, seed=own_seed)
        dense = results.evaluated(spec, split, *weights)
        for form, method, kept in product(args.convolutions, args.methods, args.shares):
            settings = {
                "method": method,
                "share": kept,
                "convolutions": form,
                "examples": args.examples if METHODS[method].metric == "fisher" else None,
                "per_gradient": args.examples_per_gradient,
                "epochs": args.epochs,
            }
            identity = {
                "model": name,
                "seed": own_seed,
                "weights_before": results.fingerprint(dense.params),
                "settings": settings,
            }

            def make(dense=dense, form=form, method=method, kept=kept, seed=own_seed):
                found = decomposed(
                    spec,
                    dense,
                    split,
                    method=method,
                    share=kept,
                    convolutions=form,
                    examples=args.examples,
                    per_gradient=args.examples_per_gradient,
                    chunk=max(HELD, args.examples_per_gradient),
                    epochs=args.epochs,
                    seed=seed,
                )
                return {**found, "dense_accuracy": dense.accuracy, "dense_loss": dense.loss}

            rows.append(runner.once(identity, make))
    return rows


def _title(row: dict, args: argparse.Namespace) -> str:
    """Name of a row's method, with the form of convolutions if several are compared."""
    settings = row["settings"]
    form = f", {settings['convolutions']}" if len(args.convolutions) > 1 else ""
    return METHODS[settings["method"]].title + form


def table(rows: Sequence[dict], args: argparse.Namespace) -> record.Table:
    """Results of one network: a row per method, for each share of weights the score and loss.

    Args:
        rows: objects of `results.json`.
        args: the arguments.
    """
    spec = MODELS[rows[0]["model"]]
    shares = sorted({row["settings"]["share"] for row in rows}, reverse=True)
    score = "accuracy, %" if spec.mean is None else "squared error"
    names = {"accuracy": (score, 2), "loss": ("loss", 4)}
    if args.epochs:
        names |= {"trained_accuracy": (f"{score}, trained on", 2)}
        names |= {"trained_loss": ("loss, trained on", 4)}
    dense = [[row[f"dense_{f.removeprefix('trained_')}"] for row in rows] for f in names]
    cells: list[list[record.Cell]] = [["dense", *map(record.spread, dense * len(shares))]]
    for title in dict.fromkeys(_title(row, args) for row in rows):
        own = [row for row in rows if _title(row, args) == title]
        of = [
            [row.get(field) for row in own if row["settings"]["share"] == x]
            for x in shares
            for field in names
        ]
        cells.append([title, *map(record.spread, of)])
    return record.Table(
        title=f"{spec.name}, kernels decomposed to a share of their weights",
        columns=["", *(f"{100 * x:g} %: {title}" for x in shares for title, _ in names.values())],
        rows=cells,
        decimals=[0, *[n for _, n in names.values()] * len(shares)],
        seed=record.seeds(rows),
        data=f"{spec.dataset}, test examples",
        examples=f"{args.examples:,} training examples for the Fisher, "
        f"{args.examples_per_gradient} in a gradient; epochs of training on: {args.epochs}",
        note=f"{record.MEDIANS}; losses in nats.",
    )


def _picture(path: Path, rows: Sequence[dict], args: argparse.Namespace) -> Path:
    panels, levels = curves.gathered(rows, lambda row: _title(row, args), "share", "loss")
    return curves.curves(
        path, panels, across="weights of the kernels, %", up="test loss, nats", levels=levels
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Decomposes, prints the tables, and draws the picture.

    Args:
        argv: command line; None for that of the process.

    Returns:
        Exit status.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    with arguments.refusing(parser, args.out):
        for name in args.networks:
            datasets.check(MODELS[name].dataset, args.data_dir)
        if not all(args.shares):
            raise ValueError("a share of the weights must be above 0, got 0")
        results.load(args.out / "results.json")
        args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out / "results.json")
    rows, made = [], {}
    for name in args.networks:
        own = _rows(args, name, runner)
        rows += own
        made[name] = table(own, args)
        print(f"\n{made[name].title}\n{made[name]}")
    print(f"\n{_picture(args.out / 'low_rank.png', rows, args)}")
    if args.record:
        whole = record.stacked(made, "Kernels decomposed to a share of their weights")
        record.keep(args.record, whole, "experiments.low_rank", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
