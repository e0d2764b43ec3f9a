"""Removes units for half of the operations, or of the time, trains on, and times what is left.

    python -m experiments.deploy.finetune
    python -m experiments.deploy.finetune --network autoencoder --checkpoint autoencoder.npz

Units are chosen by their scores for their cost, in operations or, with `--goal time`, in time
measured here, or, with `--time-share`, in both at once.  Scores: squared weights (`magnitude`, the
L2 norm), the Fisher of gates behind the units (`gates`, `flj.gate_scores`), their own blocks of
FishLeg's inverse (`obs`) or Fisher (`obd`, `flj.unit_scores`), or `auto`: of all these the one with
the lowest loss on training examples that neither the curvature nor the training has seen, after
training on half of the images.  The smaller network is trained on all training images, with one
learning rate for all methods.  With `+group` behind the name of scores the weights that stay first
make up for those that go, by the group update preconditioned by FishLeg; `auto` tries all scores
with and without.  `dense` is the whole network, trained on like the others.  Batch norm is
recomputed before the accuracy without training is measured.  Dense and smaller networks are timed
in turn, in plain XLA, with the images already on the device, when all is trained.  Results go to
`results.json` of `--out`; the same command goes on after it was stopped.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.data import datasets
from experiments.deploy import measuring
from experiments.models import cases, recalibration, resizing, training
from experiments.models.specs import MODELS, Spec, as_batch
from experiments.report import record
from experiments.running import arguments, results
from experiments.running.runner import Runner

SCORES = ("magnitude", "gates", "obs", "obd")
GROUP = "+group"  # behind the name of scores: kept weights make up for those that go
CHOICES = (*SCORES, *(name + GROUP for name in SCORES))  # of `auto`
DENSE = "dense"
METHODS = (*CHOICES, "auto", DENSE)
CHUNK = 64  # examples whose gradients are in memory at a time
HELD_OUT = 10_000  # training examples that decide between scores, at most a quarter of them
TRIAL = 2  # scores are chosen by one training image in TRIAL
TIMED = 128  # examples in a timed batch


class Smaller(NamedTuple):
    """A network with fewer units: arrays, batch-norm statistics, share of the operations."""

    params: Any
    constants: Any
    share: float


class Case(NamedTuple):
    """What the methods of one seed share."""

    spec: Spec
    data: datasets.Data
    dense: results.Dense
    args: argparse.Namespace
    seed: int

    def predict(self, params: Any, inputs: Any, *constants: Any) -> Any:
        """The network with the sizes of its parameters."""
        with resizing.sizes_of_params():
            return self.spec.model.predict(params, inputs, *constants)

    @property
    def held_out(self) -> int:
        """Number of training examples that decide between scores, none of the curvature's."""
        total = len(self.data.train[0])
        return min(HELD_OUT, total // 4, total - self.args.examples)

    def rows(self) -> np.ndarray:
        """Numbers of the training examples in the order of the seed: the curvature's come first."""
        return np.random.default_rng(self.seed).permutation(len(self.data.train[0]))

    def batches(self, examples: int, begin: int = 0) -> list[tuple]:
        """Training examples in the order of the seed, from a place on."""
        inputs, targets = self.data.train
        rows, size = self.rows()[begin : begin + examples], self.spec.batch
        return [
            as_batch(inputs[part], targets[part], self.dense.constants)
            for part in np.split(rows, range(size, len(rows), size))
        ]


class Scores:
    """Scores of units by name, and their masks, each made once, when it is asked for."""

    def __init__(self, case: Case):
        """Makes nothing yet."""
        self.case = case
        self.inputs = case.data.train[0][:TIMED]
        self.constants = {"constants": case.dense.constants} if case.dense.constants else {}
        self._masks: dict[str, Any] = {}
        self.batches = case.batches(case.args.examples)
        self.key = jax.random.key(case.seed)

    @cached_property
    def gates(self) -> flj.UnitScores:
        """Scores of gates, which find the couplings."""
        model = self.case.spec.model._replace(predict=self.case.predict)
        params = self.case.dense.params
        return flj.gate_scores(model, params, self.batches, key=self.key, examples_per_chunk=CHUNK)

    @cached_property
    def fitted(self) -> tuple[flj.InverseFisher, Any]:
        """FishLeg and its state."""
        estimator = flj.inverse.fishleg(self.case.spec.model)
        return estimator, flj.fit(estimator, self.case.dense.params, self.batches, key=self.key)

    @cached_property
    def operations(self) -> int:
        """Operations of the dense network."""
        whole = flj.compact(
            self.case.predict, self.case.dense.params, None, self.inputs, **self.constants
        )
        return whole.report.flops[0]

    def masks(self, name: str) -> Any:
        """Masks without the units with the lowest of the scores of a name, for their cost."""
        if name not in self._masks:
            args = self.case.args
            goal = flj.targets.flops(args.share * self.operations)
            if args.goal == "time":
                goal = flj.targets.time_share(args.share)
            elif args.time_share:
                goal = [goal, flj.targets.time_share(args.time_share)]
            self._masks[name] = flj.choose_units(
                self.case.predict,
                self.case.dense.params,
                self[name],
                goal,
                self.inputs,
                multiple_of=args.multiple_of,
                **self.constants,
            )
        return self._masks[name]

    def compensated(self, masks: Any) -> Any:
        """Weights that make up for those of the units that go, by the group update in one stage."""
        estimator, state = self.fitted
        return flj.prune_one_shot(
            self.case.spec.model,
            self.case.dense.params,
            estimator,
            self.batches,
            sparsity=flj.targets.masks(masks),
            stages=flj.Stages(1, state=state),
            key=self.key,
        ).params

    def __getitem__(self, name: str) -> Any:
        """Scores by one of `SCORES`."""
        params = self.case.dense.params
        if name == "magnitude":
            return jax.tree.map(jnp.square, params)
        if name == "gates":
            return self.gates
        return flj.unit_scores(*self.fitted, params, self.gates.couplings, saliency=name)


def smaller(case: Case, scores: Scores, name: str) -> Smaller:
    """Removes the units with the lowest scores for their cost, and recomputes batch norm."""
    params, constants = case.dense.params, case.dense.constants
    if name == DENSE:
        return Smaller(params, constants, 1.0)
    masks = scores.masks(name.removesuffix(GROUP))
    if name.endswith(GROUP):
        params = scores.compensated(masks)
    small = flj.compact(case.predict, params, masks, scores.inputs, **scores.constants)
    after = recalibrated(case, small.params, small.constants)
    return Smaller(small.params, after, small.report.flops[1] / scores.operations)


def recalibrated(case: Case, params: Any, constants: Any) -> Any:
    """Batch-norm statistics recomputed on training images, if there are any."""
    if not constants:
        return case.dense.constants
    with resizing.sizes_of_params():
        return recalibration.recalibrated(case.spec, params, constants, case.data.train, case.seed)


def better(case: Case, candidates: Mapping[str, Smaller]) -> str:
    """The candidate that loses least on held-out training examples after some training on."""
    examples = case.args.examples
    held_out = case.batches(case.held_out, begin=examples)
    others = np.delete(case.rows(), slice(examples, examples + case.held_out))
    part = np.sort(others[: len(case.data.train[0]) // TRIAL])
    train = tuple(x[part] for x in case.data.train)

    def loss_of(small: Smaller) -> float:
        small = trained_on(case, small, train)
        model = case.spec.model._replace(predict=case.predict)
        own = [as_batch(*batch[:2], small.constants) for batch in held_out]
        return float(np.mean([flj.loss(model, small.params, batch) for batch in own]))

    return min(candidates, key=lambda name: loss_of(candidates[name]))


def measured(case: Case, small: Smaller, prefix: str = "") -> dict[str, float]:
    """Accuracy and loss on test examples."""
    with resizing.sizes_of_params():
        pair = results.measure(case.spec, small.params, case.data.test, small.constants)
    return dict(zip((f"{prefix}accuracy", f"{prefix}loss"), pair, strict=True))


def trained_on(case: Case, small: Smaller, train: tuple) -> Smaller:
    """Trains the smaller network on."""
    if not case.args.epochs:
        return small
    with resizing.sizes_of_params():
        params, constants = training.train(
            case.spec,
            train,
            epochs=case.args.epochs,
            seed=case.seed,
            start=(small.params, small.constants),
            learning_rate=case.args.learning_rate,
        )
    return small._replace(params=params, constants=constants)


def path_of(args: argparse.Namespace, method: str, seed: int) -> Path:
    """The file of a smaller network."""
    goal = "" if args.goal == "operations" else f"_{args.goal}"
    goal += f"_time{args.time_share}" if args.time_share else ""
    return args.out / f"{args.network}_{args.share}{goal}_{method}_seed{seed}.safetensors"


def run_seed(case: Case, missing: Sequence[str], runner: Runner, identity: Mapping) -> None:
    """Removes units and trains on by every method that is still missing."""
    scores = Scores(case)
    made: dict[str, Smaller] = {}
    for method in missing:
        names = CHOICES if method == "auto" else (method,)
        for name in names:
            made[name] = made.get(name) or smaller(case, scores, name)
        chosen = better(case, {name: made[name] for name in names}) if len(names) > 1 else method
        same = next((r for r in runner.rows if _same(r, chosen, case.seed)), None)
        if same is None:
            begin = time.process_time()
            last = trained_on(case, made[chosen], case.data.train)
            found = {
                **measured(case, made[chosen]),
                **measured(case, last, "finetuned_"),
                "finetune_cpu_seconds": time.process_time() - begin,
                "share": made[chosen].share,
            }
            kept = {"params": last.params, "constants": last.constants or {}}
            flj.export.save_params(path_of(case.args, chosen, case.seed), kept)
        else:  # the same units by another name: trained once
            fields = ("accuracy", "loss", "finetuned_accuracy", "finetuned_loss", "share")
            found = {field: same[field] for field in (*fields, "finetune_cpu_seconds")}
        row = {**identity, "method": method, "chosen": chosen, **found}
        runner.keep(row | {"dense_accuracy": case.dense.accuracy, "dense_loss": case.dense.loss})
        print(f"seed {case.seed}  {method:10} {found['finetuned_accuracy']:.2f}", flush=True)


def _same(row: Mapping[str, Any], chosen: str, seed: int) -> bool:
    return row["chosen"] == chosen and row["seed"] == seed


def run_of(case: Case, params: Any, constants: Any) -> measuring.Call:
    """A network in plain XLA."""
    function = jax.jit(lambda inputs: case.predict(params, inputs, *filter(None, [constants])))
    return lambda inputs: function(inputs).block_until_ready()


def timed(case: Case, chosen: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of a batch, of the dense network and the smaller ones, in turn."""
    # to copy the images to the device takes as long as half of a small network
    batch = jnp.asarray(case.data.test[0][:TIMED])
    runs = {measuring.BASE: run_of(case, case.dense.params, case.dense.constants)}
    for name in dict.fromkeys(chosen):
        kept = flj.export.load_params(path_of(case.args, name, case.seed)).params
        runs[name] = run_of(case, kept["params"], kept.get("constants"))
    times = measuring.in_turn(runs, batch, case.args.seconds)
    return {name: 1e3 * float(np.median(own)) for name, own in times.items()}


def table(
    case: Case, rows: Sequence[Mapping[str, Any]], times: Mapping[str, float]
) -> record.Table:
    """A row for each method, the median and the range over seeds in each column."""
    base, settings, asked = times[measuring.BASE], rows[0]["settings"], rows[0]["asked_share"]
    cells: list[list[record.Cell]] = [["dense", 1, None, case.dense.accuracy, base, 1]]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        fields = ("share", "accuracy", "finetuned_accuracy")
        spreads = [record.spread([row[field] for row in own]) for field in fields]
        ms = times[own[0]["chosen"]]
        title = "dense, trained on" if name == DENSE else name
        cells.append([title, *spreads, ms, base / ms])
    score = "accuracy, %" if case.spec.mean is None else "squared error"
    train, epochs = len(case.data.train[0]), settings["epochs"]
    chose = ""
    if any(row["method"] == "auto" for row in rows):
        chose = f"{case.held_out:,} others choose scores, "
    both = f" and {settings['time_share']:.0%} of the time" if "time_share" in settings else ""
    return record.Table(
        title=f"{case.spec.name}, fewer units, at most {asked:.0%} of the {case.args.goal}{both}",
        columns=["", "operations", f"{score}, not trained", "trained on", "ms", "times as fast"],
        rows=cells,
        decimals=[0, 2, 2, 2, 2, 2],
        seed=record.seeds(rows),
        data=case.spec.dataset,
        examples=f"{settings['examples']:,} training examples for the curvature, {chose}"
        f"{train:,} for {epochs} epochs of training; all test examples",
        note=f"{record.MEDIANS}; milliseconds of a batch of "
        f"{TIMED} on the device in plain XLA, in turn, with the first seed's units.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(
        "experiments.deploy.finetune", "Remove units, train on, and time what is left."
    )
    add, option = parser.add_argument, arguments.option
    out = Path("results/finetune")
    add("--network", choices=MODELS, default="cnn", help="default: cnn, of digits")
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights; default: the shared ones")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist or cifar10")
    one = arguments.one_of(METHODS)
    several = ["magnitude", "auto"]
    option(parser, "--method", one, several, f"of {', '.join(METHODS)}", several=True)
    stays = "of the operations or the time, that stays"
    option(parser, "--share", arguments.positive_share, 0.5, stays)
    add("--goal", choices=("operations", "time"), default="operations", help="of --share")
    add("--time-share", type=arguments.positive_share, help="of the time too; default: any")
    option(parser, "--multiple-of", arguments.at_least(1), 8, "sizes are multiples of it")
    option(parser, "--epochs", arguments.at_least(0), 2, "of training on")
    option(parser, "--learning-rate", arguments.positive, 1e-3, "the largest one")
    option(parser, "--examples", arguments.at_least(1), 1024, "for the curvature")
    option(parser, "--seconds", arguments.positive, 10.0, "of the timing")
    option(parser, "--seed", arguments.seed, [0], several=True)
    add("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    spec = MODELS[args.network]
    if args.goal == "time" and args.time_share:
        parser.error("--time-share bounds the time beside the operations: leave out --goal time")
    with arguments.refusing(parser, args.out):
        data = datasets.load(spec.dataset, args.data_dir)
        if "auto" in args.method and len(data.train[0]) <= args.examples:
            raise ValueError(
                f"--examples {args.examples} leaves no training example for auto to choose by, of "
                f"{len(data.train[0])}: take fewer"
            )
        args.out.mkdir(parents=True, exist_ok=True)
        params, constants, _ = cases.network(
            spec.name, train_in=args.out, checkpoint=args.checkpoint, data_dir=args.data_dir
        )
    runner = Runner(args.out / "results.json")
    dense = results.evaluated(spec, data, params, constants)
    names = ("multiple_of", "epochs", "learning_rate", "examples")
    for seed in args.seed:
        identity = {
            "model": spec.name,
            "asked_share": args.share,
            "seed": seed,
            "settings": {name: getattr(args, name) for name in names}
            | ({} if args.goal == "operations" else {"goal": args.goal})
            | ({"time_share": args.time_share} if args.time_share else {}),
        }
        missing = runner.missing(identity, [{"method": method} for method in args.method])
        case = Case(spec, data, dense, args, seed)
        if missing:
            run_seed(case, [one["method"] for one in missing], runner, identity)
    case = case._replace(seed=args.seed[0])
    own = [row for row in runner.rows if row["seed"] == case.seed]
    made = table(case, runner.rows, timed(case, [row["chosen"] for row in own]))
    print(made)
    print(runner.path)
    record.keep(args.record, made, "experiments.deploy.finetune", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
