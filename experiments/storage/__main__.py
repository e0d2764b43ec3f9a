"""Stores networks in noisy analog cells, allotted by curvature, and counts the cells.

    python -m experiments.storage
    python -m experiments.storage --model mlpnet --seed 0,1,2
    python -m experiments.storage --model resnet20 --draws 5 --test 2000 --out results/storage_r20

The dense network and the one that FishLeg's default call prunes are written to noisy cells, and
read once: phase-change memory as measured, and cells with normal noise of a fifth of their range.
Every weight has as many cells as any other, or as many as curvature says, weight by weight or row
by row of its kernel: the Fisher at weights with the noise of such cells (`--curvature exact`:
without).  Accuracies are means over draws of the noise.  Beside them stands digital storage in
the same cells: 8 bits a weight, in the number of levels that takes the fewest cells with a BCH
code that makes it safe.  Signs, positions of zeros, ranges, and the numbers of cells, without
which nothing can be read, are digital for all, and counted.

Prints accuracies, the cells that are needed to come within some points of the accuracy without
noise, and the four codings beside one another.  Results and a picture go to `--out`; the same
command goes on after it was stopped.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.data import datasets
from experiments.models import checkpoints, training
from experiments.models.specs import MODELS, Spec
from experiments.report import record
from experiments.running import arguments, files
from experiments.running.runner import Runner
from experiments.storage import measuring, pictures, tables
from fishleg_jax import storage

MODEL_NAMES = ("mlp", "cnn", "mlpnet", "resnet20")
EACH = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0]
CELLS = ["pcm", "0.2"]
EXAMPLES = {"mlp": 512, "cnn": 512, "mlpnet": 4096, "resnet20": 2048}


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command("experiments.storage", "Store networks in noisy cells.")
    add, option = parser.add_argument, arguments.option
    add("--model", choices=MODEL_NAMES, default="mlp", help="default: mlp, on digits")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist or cifar10")
    option(parser, "--sparsity", arguments.sparsity, 0.9, "of the pruned network")
    option(parser, "--most-stages", arguments.at_least(1), 16, "of the pruning")
    option(parser, "--cell", _cell, CELLS, "pcm, or noise over the range", several=True)
    option(parser, "--each", arguments.positive, EACH, "cells for a weight", several=True)
    words = "weights at which the Fisher is taken: as they are read (noisy), or as they are (exact)"
    option(parser, "--curvature", arguments.one_of(measuring.CURVATURES), "noisy", words)
    option(parser, "--draws", arguments.at_least(2), 10, "of the noise")
    add("--examples", type=arguments.at_least(64), help="for the curvature")
    option(parser, "--test", arguments.at_least(1), 10_000, "test examples, at most")
    option(parser, "--seed", arguments.seed, [0], several=True)
    out = Path("results/storage")
    add("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    return parser


def _cell(text: str) -> str:
    return text if text == "pcm" else f"{arguments.positive(text):g}"


def _measure(
    args: argparse.Namespace, spec: Spec, split: datasets.Data, loaded: Any, runner: Runner
) -> None:
    """All numbers of cells, networks and seeds; those that are known already are kept."""
    plain = next(iter(measuring.CODINGS))
    wanted = [
        {"allotment": allotment, "each": each, "coding": plain}
        for each in args.each
        for allotment in measuring.ALLOTMENTS
    ]
    others = [coding for coding in measuring.CODINGS if coding != plain]
    wanted += [
        {"allotment": allotment, "each": tables.EACH_CODING, "coding": coding}
        for coding in others
        for allotment in measuring.ALLOTMENTS
    ]
    wanted.append({"allotment": "digital", "each": None, "coding": None})
    for seed in args.seed:
        for name, sparsity in (("dense", None), ("pruned", args.sparsity)):
            network = None  # made once there is something to measure
            for kind in args.cell:
                identity = {
                    "model": spec.name,
                    "network": name,
                    "seed": seed,
                    "settings": {
                        "cell": kind,
                        "curvature": args.curvature,
                        "sparsity": args.sparsity,
                        "examples": args.examples,
                        "most_stages": args.most_stages,
                        "draws": args.draws,
                        "test": args.test,
                    },
                }
                missing = runner.missing(identity, wanted)
                if missing and network is None:
                    network = measuring.made(
                        *(spec, *loaded, split),
                        sparsity=sparsity,
                        examples=args.examples,
                        stages=args.most_stages,
                        test=args.test,
                        seed=seed,
                    )
                for one in missing:
                    runner.keep({**identity, **one, **_one(args, spec, network, kind, seed, one)})


def _one(
    args: argparse.Namespace,
    spec: Spec,
    network: measuring.Network,
    kind: str,
    seed: int,
    wanted: Mapping[str, Any],
) -> dict[str, Any]:
    """Further fields of one object of `results.json`."""
    cell = storage.pcm() if kind == "pcm" else storage.gaussian(float(kind))
    exact = training.evaluate(spec.model, network.params, network.test, network.constants)[0]
    if wanted["allotment"] == "digital":
        return {"exact": exact, **measuring.digital(spec, network, cell, tables.BITS)}
    return {
        "exact": exact,
        **measuring.accuracies(
            spec,
            network,
            wanted["allotment"],
            wanted["each"],
            cell=cell,
            coding=measuring.CODINGS[wanted["coding"]],
            curvature=args.curvature,
            draws=args.draws,
            seed=seed,
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    spec = MODELS[args.model]
    args.examples = args.examples or EXAMPLES[args.model]
    args.each = sorted(args.each)
    with arguments.refusing(parser, args.out):
        if args.each[0] < 1:
            raise ValueError(f"--each {args.each[0]:g}: a weight takes at least one cell")
        split = datasets.load(spec.dataset, args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
        if spec.checkpoint:
            loaded = checkpoints.load(files.shared(spec.checkpoint), spec)
        else:
            loaded = training.trained(spec, split.train, args.out / f"{spec.name}.npz")
    runner = Runner(args.out / "results.json")
    _measure(args, spec, split, loaded, runner)
    weights = sum(w.size for w in jax.tree.leaves(loaded[0]))
    whole: dict[str, dict[str, record.Table]] = {}
    for kind in args.cell:
        rows = [row for row in runner.rows if row["settings"]["cell"] == kind]
        plain = tables.plain(rows)
        name = "PCM" if kind == "pcm" else f"noise {kind}"
        made = {
            "": tables.show(plain, weights),
            "_needed": tables.needed(plain, weights),
            "_codings": tables.codings(rows, weights),
        }
        for suffix, one in made.items():
            whole.setdefault(suffix, {})[name] = one
            print(f"{name}, {one.title}\n{one}\n")
        print(pictures.accuracy_vs_cells(args.out / f"cells_{kind}.png", plain, weights))
    for suffix, parts in whole.items():
        if args.record:
            title = next(iter(parts.values())).title
            made = record.stacked(parts, title)
            record.keep(args.record + suffix, made, "experiments.storage", argv)
    print(runner.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
