"""Shows who loses by pruning: every method at equal sparsity, prediction by prediction.

    python -m experiments.disagreement
    python -m experiments.disagreement --dataset cifar10 --seed 0,1,2 --out results/disagree_cifar10

Digits: a small fully connected network, trained by the command.  CIFAR-10: ResNet-20 at the
checkpoint of the shared folder, batch norm recomputed after pruning; its ensemble consists of a
small convolutional network.  Every method prunes with the library's default call; `fishleg,
label-free` sees the dense network's outputs in place of labels.  Mismatches are counted on test
images; those on training images are set beside their memorisation, which is estimated from networks
trained on seven tenths of them each (Feldman & Zhang 2020), and test images that are lost beside
the influence of the training image that counts most for them.

A seed draws the examples of the curvature; the dense network is the same.  Prints a table of
medians over seeds, with the least and the largest, and the paired difference between labels and
the teacher.  Networks on subsets, results and pictures go to `--out`; the same command goes on
after it was stopped.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fishleg_jax as flj
from experiments.data import datasets
from experiments.disagreement import ensemble, influence, pictures
from experiments.disagreement.comparing import FREE, NAMES, Case, compare, fields, prune
from experiments.models import checkpoints, networks, training
from experiments.models.specs import MODELS, make_spec
from experiments.report import record
from experiments.report.paired import loss_difference
from experiments.running import arguments, files
from experiments.running.runner import Runner

DIGITS = make_spec(
    "digits_mlp",
    networks.Mlp((32, 10)),
    "digits",
    (8, 8, 1),
    epochs=60,
    train_batch=64,
    examples=512,
    batch=64,
)
SPECS = {"digits": DIGITS, "cifar10": MODELS["resnet20"]}
ON_SUBSETS = {"digits": DIGITS, "cifar10": ensemble.SMALL}
SPARSITIES = {"digits": 0.9, "cifar10": 0.8}
EXAMPLES = {"digits": 512, "cifar10": 2048}
SUBSETS = {"digits": 40, "cifar10": 20}
EPOCHS = {"digits": 15, "cifar10": ensemble.SMALL.epochs}  # of the networks on subsets
COLUMNS = {
    "differ, %": ("mismatches", 2),
    "lost": ("lost", 0),
    "gained": ("gained", 0),
    "accuracy, %": ("accuracy", 2),
    "calibration error, %": ("calibration", 2),
    "differ in training, %": ("train_mismatches", 2),
    "memorised by": ("memorised_excess", 3),
    "influenced by": ("influence_excess", 3),
}


def table(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> record.Table:
    """A row for each method, the median and the range over seeds in each column.

    Args:
        rows: objects of `results.json`.
        args: the arguments.
    """
    first = rows[0]
    unscored = first["settings"].get("unscored", 0)
    left_out = ""
    if unscored:
        left_out = (
            f"; {unscored:,} images that all or none of the {args.subsets} networks were trained "
            "on have no score and are left out"
        )
    dense = {"accuracy": first["dense_accuracy"], "calibration": first["dense_calibration"]}
    cells: list[list[record.Cell]] = [["dense", *(dense.get(f) for f, _ in COLUMNS.values())]]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        cells.append([name, *(record.spread([row[f] for row in own]) for f, _ in COLUMNS.values())])
    return record.Table(
        title=f"Who loses, {args.dataset} at {args.sparsity:.0%} sparsity",
        columns=["", *COLUMNS],
        rows=cells,
        decimals=[0, *(digits for _, digits in COLUMNS.values())],
        seed=record.seeds(rows),
        data=f"{args.dataset}; {first['model']}; every method's default call, with at most "
        f"{args.most_stages} stages",
        examples=f"{args.examples:,} training images for every method; "
        f"{first['test_examples']:,} test images; memorisation from {args.subsets} networks, "
        "trained on seven tenths of the training images each",
        note=f'{record.MEDIANS}. "Memorised by": mean '
        "memorisation of the training images whose prediction changes, minus that of the others"
        f'{left_out}. "Influenced by": mean influence on test images that are lost, minus that on '
        "the others that the dense network has right; that of the training image of the same class "
        "that one half of the networks finds to count most, measured in the other half.",
    )


def against_labels(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mismatches against the teacher's outputs minus those against labels, in percentage points."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        method, free, _ = name.partition(FREE)
        pair = [
            {row["seed"]: row for row in rows if row["method"] == one} for one in (name, method)
        ]
        seeds = [seed for seed in pair[0] if seed in pair[1]]
        if not free or not seeds:
            continue
        differ = [np.array([_differ(own[seed]) for seed in seeds]) for own in pair]
        lines.append(f"{name}: {loss_difference(*differ)} points of predictions that differ")
    return "\n".join(lines)


def _differ(row: Mapping[str, Any]) -> np.ndarray:
    found = np.zeros(row["test_examples"])
    found[row["where"]] = 100
    return found


def _case(
    args: argparse.Namespace, split: datasets.Data
) -> tuple[Case, influence.Strongest | None]:
    """The dense network, memorisation of training images, and influence on test images."""
    spec = SPECS[args.dataset]
    if spec.checkpoint:
        params, constants = checkpoints.load(files.shared(spec.checkpoint), spec)
    else:
        params, constants = training.trained(spec, split.train, args.out / f"{spec.name}.npz")
    small, folder = ON_SUBSETS[args.dataset], args.out / "subsets"
    found = ensemble.trained(small, split, folder, args.subsets, args.epochs)
    scores = flj.memorisation(found.correct, found.members).score
    case = Case(spec, params, constants, split, scores)
    if found.test is None:
        return case, None
    return case, influence.strongest(found, split.train[1], split.test[1])


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command("experiments.disagreement", "Show who loses by pruning.")
    add, option = parser.add_argument, arguments.option
    add("--dataset", choices=SPECS, default="digits", help="default: digits")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has cifar10")
    add("--sparsity", type=arguments.sparsity, help=f"default: {_by_dataset(SPARSITIES)}")
    add("--examples", type=arguments.at_least(64), help=f"default: {_by_dataset(EXAMPLES)}")
    add("--subsets", type=arguments.at_least(4), help=f"networks; default: {_by_dataset(SUBSETS)}")
    words = f"of the networks on subsets; default: {_by_dataset(EPOCHS)}"
    add("--epochs", type=arguments.at_least(1), help=words)
    methods = f"separated by semicolons, of {'; '.join(NAMES)}; default: all"
    add("--method", type=_methods, default=list(NAMES), help=methods)
    option(parser, "--most-stages", arguments.at_least(1), 16, "of every method")
    option(parser, "--seed", arguments.seed, [0], several=True)
    out = Path("results/disagreement")
    add("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    return parser


def _methods(text: str) -> list[str]:
    return [arguments.one_of(NAMES)(part.strip()) for part in text.split(";")]


def _by_dataset(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    given = {"sparsity": SPARSITIES, "examples": EXAMPLES, "subsets": SUBSETS, "epochs": EPOCHS}
    for name, values in given.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.dataset])
    with arguments.refusing(parser, args.out):
        split = datasets.load(args.dataset, args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
        case, strongest = _case(args, split)
    runner = Runner(args.out / "results.json")
    unscored = int(np.isnan(case.memorisation).sum())
    for seed in args.seed:
        identity = {
            "model": case.spec.name,
            "sparsity_target": args.sparsity,
            "seed": seed,
            "settings": {
                "examples": args.examples,
                "subsets": args.subsets,
                "epochs": args.epochs,
                "most_stages": args.most_stages,
                # earlier results counted these images with a score of 0, and are not taken
                **({"unscored": unscored} if unscored else {}),
            },
        }
        for one in runner.missing(identity, [{"method": name} for name in args.method]):
            result, constants = prune(
                case,
                one["method"],
                sparsity=args.sparsity,
                examples=args.examples,
                batch=case.spec.batch,
                stages=args.most_stages,
                seed=seed,
            )
            test, train = (
                compare(case, result.params, constants, train=which) for which in (False, True)
            )
            measured = {"stages": len(result.stages), **fields(test, train)}
            runner.keep({**identity, **one, "dataset": args.dataset, **measured})
            print(f"seed {seed}  {one['method']:20} {test.summary()}", flush=True)
    order = {name: i for i, name in enumerate(args.method)}
    rows = sorted(runner.rows, key=lambda row: (row["seed"], order[row["method"]]))
    right = None
    if strongest is not None:
        right = ensemble.correct(case.spec, case.params, case.constants, split.test)
    rows = influence.with_influence(rows, strongest, right)
    made = table(rows, args)
    print(made)
    record.keep(args.record, made, "experiments.disagreement", argv)
    print(against_labels(rows))
    print(influence.text(rows))
    print(runner.path)
    first = [row for row in rows if row["seed"] == args.seed[0]]
    print(pictures.lost_images(args.out / "lost.png", first, split))
    print(pictures.rates(args.out / "rates.png", rows))
    if strongest is not None:
        lost = sorted({i for row in first for i in row["where_lost"]})
        print(pictures.influential(args.out / "influence.png", lost, strongest, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
