"""Prunes the coefficients of a discrete cosine transform beside the weights themselves.

    python -m experiments.bases
    python -m experiments.bases --modes dynamic
    python -m experiments.bases --networks resnet20 --modes one_shot,dynamic

Every network is pruned to the same share of coefficients in three ways: its weights in `space`, the
DCT of its kernels (`dct`), and the DCT with high frequencies pruned harder (`dct_bands`), by
magnitude and by FishLeg with OBS scores.  With `fishleg_default` the library chooses scores and
dampings by held-out loss, which takes longer.  In `one_shot`, the default, nothing is trained
afterwards; `dynamic` trains on while coefficients go and come back.  Only convolutions larger than
1x1 are pruned.  Batch-norm statistics are recomputed on training images after one-shot pruning.

Writes `results.json`, an object for each run, and `bases.png` and `bases_dynamic.png` into `--out`,
and prints medians over seeds with their range.  The same command goes on after it was stopped.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.bases import points, pruning
from experiments.bases.networks import NETWORKS
from experiments.data import datasets
from experiments.models import checkpoints, training
from experiments.report import curves, record
from experiments.running import arguments, files, results
from experiments.running.arguments import at_least, one_of, seed, share
from experiments.running.runner import Runner

DIGITS = ("cnn", "cnn5")


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(
        "experiments.bases", "Prune DCT coefficients of kernels beside their weights."
    )

    def option(name, parse, default, words="", several=True):
        arguments.option(parser, name, parse, default, words, several=several)

    option("--networks", one_of(NETWORKS), DIGITS)
    option("--modes", one_of(pruning.MODES), ("one_shot",))
    option("--bases", one_of(pruning.BASES), pruning.BASES)
    words = f"of {', '.join(pruning.METHODS)}"
    option("--methods", one_of(pruning.METHODS), ("magnitude", "fishleg"), words)
    option("--densities", share, [0.3, 0.2, 0.1, 0.05], "share of coefficients that is kept")
    option("--dynamic-densities", share, [0.05], "the same for dynamic pruning")
    option("--seeds", seed, [0])
    option("--examples", at_least(16), 512, "training examples for the curvature", several=False)
    option("--epochs", at_least(1), 5, "of dynamic pruning", several=False)
    parser.add_argument("--data-dir", type=Path, help="where TensorFlow Datasets has cifar10")
    option("--out", Path, Path("results/bases"), several=False)
    record.add_option(parser)
    return parser


def _rows(args: argparse.Namespace, name: str, runner: Runner) -> list[dict]:
    """All results of one network."""
    spec = NETWORKS[name]
    split = datasets.load(spec.dataset, args.data_dir)
    rows = []
    for own_seed in args.seeds:
        if spec.checkpoint:
            weights = checkpoints.load(files.shared(spec.checkpoint), spec)
        else:
            path = args.out / f"{name}_seed{own_seed}.npz"
            weights = training.trained(spec, split.train, path, seed=own_seed)
        dense = results.evaluated(spec, split, *weights)
        for mode, basis, method in itertools.product(args.modes, args.bases, args.methods):
            densities = args.densities if mode == "one_shot" else args.dynamic_densities
            for density in densities:
                wanted = {
                    "basis": basis,
                    "method": method,
                    "density": density,
                    "examples": args.examples if mode == "one_shot" else None,
                    "epochs": args.epochs if mode == "dynamic" else None,
                }
                if mode == "dynamic":  # results of other versions had another share, or rule
                    wanted["replaced"] = pruning.REPLACED
                    wanted["regrowth"] = "shadow of magnitudes"
                identity = {
                    "model": name,
                    "mode": mode,
                    "seed": own_seed,
                    "weights": results.fingerprint(dense.params),
                    "settings": wanted,
                }

                def make(dense=dense, wanted=wanted, mode=mode, seed=own_seed):
                    found = pruning.pruned(
                        spec,
                        dense,
                        split,
                        mode=mode,
                        basis_name=wanted["basis"],
                        method=wanted["method"],
                        density=wanted["density"],
                        examples=args.examples,
                        epochs=args.epochs,
                        seed=seed,
                    )
                    return {**found, "dense_accuracy": dense.accuracy}

                rows.append(runner.once(identity, make))
    return rows


def _label(row: dict) -> str:
    return f"{row['settings']['method']}, {row['settings']['basis']}"


def table(rows: Sequence[dict], args: argparse.Namespace) -> record.Table:
    """Accuracies of one network in one mode: a row per method and basis, a column per density.

    If dynamic, a further column per density has the number of coefficients that came back.

    Args:
        rows: objects of `results.json`.
        args: the arguments.
    """
    densities = sorted({row["settings"]["density"] for row in rows}, reverse=True)
    dense = record.spread([row["dense_accuracy"] for row in rows])
    name, dynamic = rows[0]["model"], rows[0]["mode"] == "dynamic"
    shown = ("accuracy", "returned") if dynamic else ("accuracy",)
    more: list[record.Cell] = [None] * (len(shown) - 1) * len(densities)
    cells: list[list[record.Cell]] = [["dense", *[dense] * len(densities), *more]]
    for label in dict.fromkeys(map(_label, rows)):
        own = [row for row in rows if _label(row) == label]
        of = [
            [r[key] for r in own if r["settings"]["density"] == density]
            for key in shown
            for density in densities
        ]
        cells.append([label, *map(record.spread, of)])
    how = f"while it trains for {args.epochs} epochs" if dynamic else "in one shot"
    return record.Table(
        title=f"{name}, pruned in space and in the DCT {how}: test accuracy, %",
        columns=[
            "",
            *(f"{100 * d:g} % kept" for d in densities),
            *(f"came back, {100 * d:g} %" for d in densities if dynamic),
        ],
        rows=cells,
        decimals=[0, *[2] * len(densities), *[0] * len(more)],
        seed=record.seeds(rows),
        data=NETWORKS[name].dataset,
        examples="all training examples, all test examples"
        if dynamic
        else f"{args.examples:,} training examples for the curvature; all test examples",
        note=f"{record.MEDIANS}.",
    )


def _picture(path: Path, rows: Sequence[dict]) -> Path:
    """Curves over densities, or with a single one a line of points for each method and basis."""
    panels, levels = curves.gathered(rows, _label, "density", "accuracy")
    if len({row["settings"]["density"] for row in rows}) == 1:
        return points.points(path, panels, along="test accuracy, %", levels=levels)
    return curves.curves(
        path, panels, across="coefficients kept, %", up="test accuracy, %", levels=levels
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prunes, prints the tables, and draws the picture.

    Args:
        argv: command line; None for that of the process.

    Returns:
        Exit status.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    with arguments.refusing(parser, args.out):
        for name in args.networks:
            datasets.check(NETWORKS[name].dataset, args.data_dir)
        if pruning.DEFAULT in args.methods and "dynamic" in args.modes:
            raise ValueError(f"{pruning.DEFAULT} is for one shot, not for --modes dynamic")
        for value in (*args.densities, *args.dynamic_densities):
            if not 0 < value <= 1:
                raise ValueError(f"a density must be in (0, 1], got {value:g}")
        results.load(args.out / "results.json")
        args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out / "results.json")
    rows = [row for name in args.networks for row in _rows(args, name, runner)]
    for mode in args.modes:
        made = {}
        for name in args.networks:
            own = [row for row in rows if row["model"] == name and row["mode"] == mode]
            made[name] = table(own, args)
            print(f"\n{made[name].title}\n{made[name]}")
        if args.record:
            whole = record.stacked(made, f"Pruned in space and in the DCT, {mode}: accuracy, %")
            suffix = "" if mode == args.modes[0] else f"_{mode}"
            record.keep(args.record + suffix, whole, "experiments.bases", argv)
    for mode in args.modes:
        own = [row for row in rows if row["mode"] == mode]
        name = "bases.png" if mode == "one_shot" else f"bases_{mode}.png"
        print(_picture(args.out / name, own))
    return 0


if __name__ == "__main__":
    sys.exit(main())
