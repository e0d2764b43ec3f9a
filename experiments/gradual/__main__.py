"""Prunes networks while they are trained on, and compares methods, step for step.

    python -m experiments.gradual
    python -m experiments.gradual --dataset mnist --method fishleg,woodfisher,magnitude
    python -m experiments.gradual --dataset cifar10 --checkpoint resnet20_cifar10.npz --seed 0

Every run starts from the same weights, trained ones or (for the digits, and by `--epochs 0`) random
ones, and sees the same batches in the same order; methods differ in nothing but their estimate of
the inverse Fisher, which sees training batches only.  With
no pruning at all the same training gives the dense row.  Into `--out` go `results.json`, the
pictures `accuracy_vs_sparsity.png` and `training.png`, and a folder for each run with
`metrics.jsonl`, the pruned weights and the masks.  The memory that a run is predicted to take is
printed before it begins, and again beside the memory measured after it.  The same command goes on
after it was stopped, or killed.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import fishleg_jax as flj
from experiments.data import datasets
from experiments.gradual import plans
from experiments.gradual.loop import CHECKPOINTS, METRICS, Carry, run
from experiments.gradual.plans import DENSE, Plan
from experiments.gradual.summary import draw, score_name, show, table
from experiments.models import checkpoints, training
from experiments.models.specs import Spec
from experiments.report import record
from experiments.running import arguments, processes, results

RESUMING = """
A run that was stopped goes on from its last checkpoint, and ends with the weights that it would
have had.  Runs that are over are in results.json and are not made again: those of the same method,
settings, sparsity, seed and weights.  To start afresh, delete --out or name another.
"""


def _parser() -> argparse.ArgumentParser:
    parser = arguments.pruning_parser(
        "experiments.gradual",
        "Prune networks while they are trained on, and compare methods.",
        methods=plans.NAMES,
        default=("fishleg", "magnitude"),
        models=tuple(plans.RECIPES),
        sparsities=(0.95, 0.98),
        seeds=range(5),
        limited=False,
        scratch=True,
    )
    parser.epilog = RESUMING
    processes.add_options(parser)
    plans.add_options(parser)
    arguments.add_memory_options(parser)
    add = parser.add_argument
    add(
        "--dense",
        choices=["trained", "start"],
        default="trained",
        help="what is compared with: the same training without pruning, or the weights before it",
    )
    add(
        "--validate",
        type=arguments.at_least(1),
        metavar="N",
        help="leave the last N training examples out, and evaluate on these instead of test ones",
    )
    add(
        "--checkpoint-every",
        type=arguments.positive,
        default=30.0,
        metavar="SECONDS",
        help="default: 30",
    )
    record.add_option(parser)
    return parser


def _check(args: argparse.Namespace, spec: Spec, split: datasets.Data) -> None:
    """Raises a ValueError where arguments do not fit together."""
    results.load(args.out / "results.json")
    examples = len(split.train[0]) - (args.validate or 0)
    if examples < spec.train_batch:
        raise ValueError(
            f"--validate {args.validate} leaves {examples} examples to train on, fewer than a "
            f"batch of {spec.train_batch}"
        )
    for plan in _plans(args, spec):
        plans.make_pruning(spec, plan, seed=0)


def _plans(args: argparse.Namespace, spec: Spec) -> list[Plan]:
    return [
        plans.make_plan(spec, args, method, sparsity)
        for sparsity in args.sparsity
        for method in args.method
    ]


def _split(args: argparse.Namespace, split: datasets.Data) -> datasets.Data:
    """The data, or all but some of the training examples, and these for testing."""
    if args.validate is None:
        return split
    inputs, targets = split.train
    cut = len(inputs) - args.validate
    return datasets.Data((inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:]))


def start_weights(
    args: argparse.Namespace, spec: Spec, split: datasets.Data, loaded: Any, seed: int
) -> tuple[Any, Any]:
    """The parameters and constants: of the checkpoint, trained and kept in `--out`, or random.

    Args:
        args: the arguments.
        spec: the model.
        split: the data that it is trained on.
        loaded: those of the checkpoint, or None.
        seed: for the training, or the random weights.
    """
    if loaded is not None:
        return loaded
    epochs = plans.RECIPES[spec.name].epochs if args.epochs is None else args.epochs
    if epochs == 0:
        return jax.jit(spec.init)(jax.random.key(seed))
    part = f"_of{len(split.train[0])}" if args.validate else ""
    path = args.out / f"{spec.name}_{epochs}epochs{part}_seed{seed}.npz"
    return training.trained(spec, split.train, path, epochs=epochs, seed=seed)


def _evaluated(
    spec: Spec, split: datasets.Data, params: Any, constants: Any, prefix: str = ""
) -> dict[str, float]:
    score, loss = training.evaluate(spec.model, params, split.test, constants, spec.mean)
    return {f"{prefix}{score_name(spec)}": score, f"{prefix}loss": loss}


def _one(
    args: argparse.Namespace,
    spec: Spec,
    split: datasets.Data,
    plan: Plan,
    start: tuple[Any, Any],
    seed: int,
    further: dict[str, Any],
) -> dict[str, Any]:
    """The object of `results.json` of a run: found there, or made."""
    path, weights = args.out / "results.json", results.fingerprint(start)
    settings = {
        **plan.settings,
        "weights": weights,
        "prunable": results.prunable(spec),
        "dense": args.dense,
        "validate": args.validate,
    }
    identity = {
        "method": plan.method,
        "dataset": spec.dataset,
        "model": spec.name,
        "sparsity_target": plan.sparsity,
        "seed": seed,
    }
    found = results.find(results.load(path), settings=settings, **identity)
    if found is not None:
        print(f"seed {seed}, {plan.method} to {100 * plan.sparsity:g} %: in {path} already")
        return found
    folder = args.out / _folder(spec, plan, seed, weights)
    carry, taken = run(
        spec,
        plan,
        split.train,
        start,
        seed=seed,
        folder=folder,
        checkpoint_every=args.checkpoint_every,
    )
    checkpoints.save(folder / "weights.npz", carry.params, carry.constants)
    row = {
        **identity,
        "sparsity": flj.sparsity(carry.params, spec.prunable),
        **_evaluated(spec, split, carry.params, carry.constants),
        **further,
        "seconds": float(carry.seconds),
        **taken._asdict(),
        **_pruning(plan, carry, folder),
        "metrics": str(folder.relative_to(args.out) / METRICS),
        "settings": settings,
    }
    processes.wait("the end of a run")  # in whose checkpoints nobody reads any more
    if processes.is_first():
        results.add(path, [row])
        shutil.rmtree(folder / CHECKPOINTS)
    return row


def _folder(spec: Spec, plan: Plan, seed: int, weights: str) -> Path:
    name = f"{spec.name}_{plan.method}_{plan.sparsity:g}_seed{seed}"
    return Path("runs") / f"{name}_{plan.name[:8]}{weights[:8]}"


def _pruning(plan: Plan, carry: Carry, folder: Path) -> dict[str, Any]:
    """Fields of a result that describe its pruning, whose masks are saved here."""
    if plan.method == DENSE:
        return {}
    found = flj.check(carry.state)
    if processes.is_first():
        flj.save_masks(folder / "masks.npz", flj.masks(carry.state))
    return {
        "violations": found.violations,
        "failures": found.failures,
        **results.measured(carry.state[-1].estimate),
    }


def compare(
    args: argparse.Namespace, spec: Spec, split: datasets.Data, loaded: Any
) -> list[dict[str, Any]]:
    """All methods, sparsities and seeds.

    Args:
        args: the arguments.
        spec: the model.
        split: the data set.
        loaded: trained parameters and constants; None to train.

    Returns:
        The objects of `results.json` that belong to the arguments.
    """
    rows = []
    for seed in args.seed:
        start = processes.everywhere(start_weights(args, spec, split, loaded, seed))
        before = _evaluated(spec, split, *start)
        dense = before
        if args.dense == "trained":
            plan = plans.make_plan(spec, args, DENSE, 0.0)
            dense = _one(args, spec, split, plan, start, seed, {})
        names = (score_name(spec), "loss")
        further = {f"dense_{name}": dense[name] for name in names}
        further |= {f"start_{name}": before[name] for name in names}
        for plan in _plans(args, spec):
            rows.append(_one(args, spec, split, plan, start, seed, further))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    with processes.joined(parser, argv):
        args, spec, split, loaded = arguments.parse(parser, argv, _check)
        split = _split(args, split)
        rows = compare(args, spec, split, loaded)
        print(show(rows, spec))
        print(args.out / "results.json")
        for path in draw(args, spec, rows) if processes.is_first() else ():
            print(path)
        if processes.is_first():
            made = table(rows, spec, len(split.train[0]), len(split.test[0]))
            record.keep(args.record, made, "experiments.gradual", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
