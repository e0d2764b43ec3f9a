"""Trains networks from scratch, and compares optimisers step for step and second for second.

    python -m experiments.train
    python -m experiments.train --dataset mnist --optimizer fishleg,adam --epochs 1,2,3 --seed 0,1,2
    python -m experiments.train --dataset mnist --prune 0.95

All optimisers start from the same weights and see the same batches in the same order, with the same
schedule, half a cosine over all steps.  Their learning rates are chosen on one grid: each rate is
tried in a short training with a schedule of that length, and judged by the loss on training
examples that are left out there; no test example is looked at.  A star behind a rate says that it
is at an end of the grid.  Then all train in turn, epoch by epoch, so that ratios of seconds are of
one run.  Each number of `--epochs` is a training of its own.

After every epoch the network is evaluated: the training loss is the mean in nats per example, in
evaluation mode, on 10,000 training examples that are always the same ones (all where there are no
more).  Seconds are without evaluation and compilation; on a CPU those of the processor.  `mnist`,
`faces` and `curves` are the auto-encoders of the papers, and curves are drawn into `--out`.

With `--prune` networks are pruned on the way, between a tenth and seven tenths of the steps: with
fishleg and kfac by the estimate that trains them, with others by `fishleg_prune` behind them.
Learning rates are those of trainings without pruning.

Prints tables and writes `results.json` and `loss.png` into `--out`, with a `metrics.jsonl` for each
training.  The same command goes on after it was stopped.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from experiments.data import datasets
from experiments.models.specs import Spec
from experiments.running.runner import Runner
from experiments.train import choice, contest, plots, summary
from experiments.train.choice import Trials
from experiments.train.optimizers import OPTIMIZERS
from experiments.train.options import parse
from experiments.train.pruning import make_goal
from experiments.train.steps import program


def _settings(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Settings that trials and trainings of an optimiser have in common."""
    return {
        "weight_decay": args.weight_decay,
        "schedule": "cosine",
        "backend": jax.default_backend(),
        **OPTIMIZERS[name].settings,
    }


def _identity(args: argparse.Namespace, spec: Spec, name: str) -> dict[str, Any]:
    return {
        "optimizer": name,
        "dataset": spec.dataset,
        "model": spec.name,
        "batch_size": args.batch_size,
    }


def rate_of(
    args: argparse.Namespace, spec: Spec, split: datasets.Data, trials: Trials, name: str
) -> tuple[float, dict[str, Any]]:
    """The learning rate of an optimiser, tried on the grid unless it is given.

    Args:
        args: The arguments.
        spec: The model.
        split: The data set.
        trials: How rates are tried.
        name: The optimiser.

    Returns:
        The rate, and settings that say how it was chosen.
    """
    if name in args.rate:
        return args.rate[name], {"trial_rates": None}
    path, losses = args.out / "results.json", {}
    for rate in trials.rates:
        row = Runner(path).once(
            {
                "kind": "trial",
                **_identity(args, spec, name),
                "learning_rate": rate,
                "settings": {
                    **_settings(args, name),
                    "trial_steps": trials.steps,
                    "held_out": trials.held_out,
                },
            },
            lambda rate=rate: {
                "held_out_loss": choice.try_rate(
                    program(spec, name, args.weight_decay, args.batch_size),
                    split.train,
                    trials,
                    rate,
                )
            },
        )
        losses[rate] = row["held_out_loss"]
    chosen = choice.best(losses)
    return chosen, trials.settings


def train(
    args: argparse.Namespace,
    spec: Spec,
    split: datasets.Data,
    rates: dict[str, tuple[float, dict[str, Any]]],
    epochs: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Trains with all optimisers in turn, for one length and seed.

    Args:
        args: The arguments.
        spec: The model.
        split: The data set.
        rates: Results of `rate_of` by optimiser.
        epochs: The length.
        seed: The seed.

    Returns:
        The objects of `results.json`, those that were there among them.
    """
    runner = Runner(args.out / "results.json")
    steps = epochs * (len(split.train[0]) // args.batch_size)
    goal = make_goal(args.prune, steps) if args.prune else None
    pruned = {} if goal is None else {"pruning": goal._asdict()}
    wanted = [
        {
            **_identity(args, spec, name),
            "learning_rate": rate,
            "sparsity_target": args.prune,
            "settings": {**_settings(args, name), **chosen, **pruned},
        }
        for name, (rate, chosen) in rates.items()
    ]
    common = {"kind": "training", "epochs": epochs, "seed": seed}

    def begin(identity: dict[str, Any]) -> contest.Training:
        return contest.Training(
            program(spec, identity["optimizer"], args.weight_decay, args.batch_size, goal),
            split,
            rate=identity["learning_rate"],
            epochs=epochs,
            seed=seed,
            folder=args.out / "runs" / _folder(identity),
            checkpoint_every=args.checkpoint_every,
        )

    title = f"{spec.name}, {epochs} epochs, seed {seed}"
    return contest.hold(runner, common, wanted, begin, title)


def _folder(identity: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    model, name, epochs, seed = (identity[k] for k in ("model", "optimizer", "epochs", "seed"))
    return f"{model}_{name}_{epochs}_epochs_seed{seed}_{digest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: The arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    args, spec, split, trials = parse(argv)
    rates = {name: rate_of(args, spec, split, trials, name) for name in args.optimizer}
    rows = [
        row
        for epochs in args.epochs
        for seed in args.seed
        for row in train(args, spec, split, rates, epochs, seed)
    ]
    print(summary.show(rows, contest.score_name(spec)))
    print(args.out / "results.json")
    name, how = (
        ("loss", "") if not args.prune else ("loss_pruned", f", pruned to {100 * args.prune:g} %")
    )
    print(plots.draw(args.out / f"{name}.png", rows, f"{args.dataset}, {spec.name}{how}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
