"""Trains with Adam's moments in low-dimensional subspaces, beside Adam itself.

    python -m experiments.low_rank.updates
    python -m experiments.low_rank.updates --network autoencoder --epochs 1 --directions 0

`flj.low_rank_updates` keeps the moments of every kernel in a subspace of its gradients, at several
ranks (shares of the smaller side) and refreshes.  Beside it stands training within a few directions
of an earlier training's first half, `flj.within_subspace`.  All start from the same weights, see
the same batches for as many steps, and take turns epoch by epoch.  Learning rates are chosen for
each on one grid by the loss on training examples that trials leave out, as in `experiments.train`;
a star behind one says that it is at an end of the grid.

Bytes are those of the arrays of the state.  Writes `results.json` and `updates.png` into `--out`,
and prints medians over seeds with their range.  The same command goes on after it was stopped.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments.data import datasets
from experiments.low_rank.variants import (
    ADAM,
    LowRankProgram,
    Trajectory,
    TrajectoryProgram,
    Variant,
)
from experiments.models.specs import MODELS, Spec
from experiments.report import curves, record
from experiments.running import arguments, files, results
from experiments.running.arguments import at_least, positive, seed, share
from experiments.running.runner import Runner
from experiments.train import choice, contest, summary
from experiments.train.choice import Trials
from experiments.train.steps import Program

NETWORKS = ("mlp", "cnn", "mlpnet", "resnet20", "autoencoder", "curves", "transformer")
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
MODULE = "experiments.low_rank.updates"


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(MODULE, "Train with Adam's moments in subspaces of the gradients.")
    add, option = parser.add_argument, partial(arguments.option, parser)
    add("--network", choices=NETWORKS, default="mlp", help="default: mlp, of digits")
    option("--ranks", share, [0.1, 0.15], "shares of the smaller side", several=True)
    option("--refreshes", at_least(1), [10, 50], "steps between refreshes", several=True)
    option("--subspaces", at_least(1), 1, "of every kernel")
    option("--directions", at_least(0), 20, "of the earlier trajectory; 0 for none")
    option("--epochs", at_least(1), 20)
    option("--seeds", seed, [0], several=True)
    option("--rates", positive, RATES, "the grid of learning rates", several=True)
    option("--trial-steps", at_least(1), 300, "length of the trials of rates")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has its data")
    option("--out", Path, Path("results/low_rank_updates"))
    record.add_option(parser)
    return parser


def _variants(args: argparse.Namespace) -> list[Variant]:
    """All ranks and refreshes, and the first of both without the rest of the gradient."""
    found = [
        Variant(rank, refresh, True, args.subspaces)
        for rank in args.ranks
        for refresh in args.refreshes
    ]
    last = found[-len(args.refreshes)]
    return [*found, last._replace(residual=False)]


class Contest:
    """What all trainings of one network share.

    Attributes:
        spec: The network.
        split: Its data set.
        trials: How learning rates are tried.
        runner: Results that are kept.
        args: The arguments.
    """

    def __init__(self, args: argparse.Namespace, spec: Spec, split: datasets.Data, trials: Trials):
        """Starts with no results."""
        self.args, self.spec, self.split, self.trials = args, spec, split, trials
        self.runner = Runner(args.out / "results.json")
        self._programs: dict[Any, Program] = {}
        self.length = args.epochs * (len(split.train[0]) // spec.train_batch)

    def program(self, of: Variant | Trajectory | str, train: datasets.Arrays) -> Program:
        """The compiled steps of an optimiser, made once."""
        if isinstance(of, Trajectory):  # which trains on these examples before
            return TrajectoryProgram(self.spec, of, self.spec.train_batch, train)
        if of not in self._programs:
            if isinstance(of, Variant):
                self._programs[of] = LowRankProgram(self.spec, of, self.spec.train_batch)
            else:
                self._programs[of] = Program(self.spec, of, 0.0, self.spec.train_batch)
        return self._programs[of]

    def identity(self, of: Variant | Trajectory | str) -> dict[str, Any]:
        """Fields that say which optimiser, on which batches."""
        named = of if isinstance(of, str) else of.name
        own = {} if isinstance(of, str) else of._asdict()
        return {
            "optimizer": named,
            "model": self.spec.name,
            "settings": {
                **own,
                "batch": self.spec.train_batch,
                "schedule": "cosine",
                "backend": jax.default_backend(),
            },
        }

    def rate(self, of: Variant | Trajectory | str) -> float:
        """The learning rate with the lowest loss on held-out training examples."""
        cut = len(self.split.train[0]) - self.trials.held_out
        seen = self.split.train[0][:cut], self.split.train[1][:cut]
        program, losses = None, {}
        for rate in self.trials.rates:
            identity = self.identity(of)
            settings = {**identity["settings"], **self.trials.settings}
            del settings["trial_rates"]
            identity |= {"kind": "trial", "learning_rate": rate, "settings": settings}

            def make(rate=rate):
                nonlocal program
                program = program or self.program(of, seen)
                found = choice.try_rate(program, self.split.train, self.trials, rate)
                return files.without_nan({"held_out_loss": found})

            losses[rate] = self.runner.once(identity, make)["held_out_loss"]
        return choice.best(losses)

    def train(self, rates: dict[Any, float], own_seed: int) -> list[dict]:
        """Trains all optimisers of one seed in turn, but those that are in the file.

        Args:
            rates: Learning rates by optimiser.
            own_seed: The seed.

        Returns:
            Their objects of `results.json`.
        """
        by_name, wanted = {}, []
        for of, rate in rates.items():
            identity = self.identity(of) | {"learning_rate": rate}
            identity["settings"] |= self.trials.settings
            by_name[identity["optimizer"]] = of
            wanted.append(identity)

        def begin(identity: dict[str, Any]) -> contest.Training:
            return contest.Training(
                self.program(by_name[identity["optimizer"]], self.split.train),
                self.split,
                rate=identity["learning_rate"],
                epochs=self.args.epochs,
                seed=own_seed,
                folder=self.args.out / "runs" / _folder(identity),
                checkpoint_every=60.0,
            )

        common = {"kind": "training", "seed": own_seed, "epochs": self.args.epochs}
        runner = Runner(self.args.out / "results.json")
        return contest.hold(runner, common, wanted, begin, f"{self.spec.name}, seed {own_seed}")


def _folder(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def table(args: argparse.Namespace, spec: Spec, rows: Sequence[dict], data: datasets.Data) -> Any:
    """A row for each optimiser, the median and the range over seeds in each column."""
    score = contest.score_name(spec)
    adam = {row["seed"]: row for row in rows if row["optimizer"] == ADAM}
    cells: list[list[record.Cell]] = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == name]
        over = lambda field, own=own: record.spread(
            [None if row[field] is None else row[field] / adam[row["seed"]][field] for row in own]
        )
        costs = [summary.cost(row, adam[row["seed"]]) for row in own]
        star = own[0]["learning_rate"] in (min(args.rates), max(args.rates))
        cells.append(
            [
                name,
                f"{own[0]['learning_rate']:g}{'*' if star else ''}",
                record.spread([row["train_loss"] for row in own]),
                over("train_loss"),
                record.spread([row[score] for row in own]),
                over("state_bytes"),
                record.spread(costs),
            ]
        )
    shown = "test accuracy, %" if score == "accuracy" else "test squared error"
    steps = rows[0]["steps"]
    held = rows[0]["settings"]["held_out"]
    return record.Table(
        title=f"{spec.name}, {steps} steps of {spec.train_batch}, Adam's state in subspaces",
        columns=[
            "",
            "rate",
            "training loss, nats",
            "over Adam's",
            shown,
            "bytes of state over Adam's",
            "seconds over Adam's",
        ],
        rows=cells,
        decimals=[0, 0, 3 if score == "accuracy" else 2, 2, 2, 3, 2],
        seed=record.seeds(rows),
        data=f"{spec.dataset}; the network `{spec.name}`",
        examples=f"{len(data.train[0]):,} to train on, {held:,} of them left out by trials of "
        f"rates; the training loss is on {min(len(data.train[0]), contest.SUBSET):,} of them; all "
        "test examples",
        note="Medians over seeds, with the least and the largest. Cosine schedules, and rates from "
        f"one grid ({', '.join(f'{rate:g}' for rate in args.rates)}; a star: at its end), seconds "
        "of the processor, in turn.",
    )


def _picture(path: Path, spec: Spec, rows: Sequence[dict]) -> Path:
    """Training loss over the bytes of the state, a curve for each refresh."""
    adam = {row["seed"]: row for row in rows if row["optimizer"] == ADAM}
    lines: dict[str, dict[float, list]] = {}
    for row in rows:
        settings = row["settings"]
        if row["train_loss"] is None or "directions" in settings:
            continue
        name = ADAM
        if "refresh" in settings:
            name = f"{settings['refresh']}" + ("" if settings["residual"] else ", no rest")
        place = round(100 * row["state_bytes"] / adam[row["seed"]]["state_bytes"], 1)
        lines.setdefault(name, {}).setdefault(place, []).append(row["train_loss"])
    across = "state, % of Adam's bytes\n(labels: steps between refreshes)"
    return curves.curves(path, {spec.name: lines}, across=across, up="training loss, nats")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table, and draws the picture.

    Args:
        argv: command line; None for that of the process.

    Returns:
        Exit status.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    spec = MODELS[args.network]
    with arguments.refusing(parser, args.out):
        datasets.check(spec.dataset, args.data_dir)
        if not all(0 < rank < 1 for rank in args.ranks):
            raise ValueError(f"--ranks must be shares between 0 and 1, got {args.ranks}")
        results.load(args.out / "results.json")
        split = datasets.load(spec.dataset, args.data_dir)
        grid = tuple(args.rates)
        trials = choice.make_trials(split.train, spec.train_batch, grid, args.trial_steps)
        args.out.mkdir(parents=True, exist_ok=True)
    own = Contest(args, spec, split, trials)
    rates: dict[Any, float] = {of: own.rate(of) for of in [ADAM, *_variants(args)]}
    if args.directions:
        earlier = Trajectory(rates[ADAM], own.length, args.directions)
        rates[earlier] = own.rate(earlier)
    rows = [row for one in args.seeds for row in own.train(rates, one)]
    made = table(args, spec, rows, split)
    print(made)
    print(_picture(args.out / "updates.png", spec, rows))
    record.keep(args.record, made, MODULE, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
