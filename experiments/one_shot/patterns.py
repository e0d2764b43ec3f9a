"""Prunes any of the models to a pattern, and says how much is scores and how much compensation.

    python -m experiments.one_shot.patterns --model transformer
    python -m experiments.one_shot.patterns --model resnet20 --pattern blocks4x4 --seed 0,1,2

Prints a table of the loss on test examples, in nats, and of the accuracy, for magnitudes and for
the scores of FishLeg, or those that lose least on held-out examples (`auto`), each without
compensation and with the group solve, and for the library's default: the median over seeds, with
the least and the largest.  A seed draws the examples of the curvature; the network and the test
examples are the same ones.  The curvature sees training examples only.  Batch norm is as stored,
and recomputed on training images (`again`).  Results go to `results.json` of `--out`; the same
command goes on after it was stopped.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import cases
from experiments.models.specs import MODELS, Spec
from experiments.one_shot.__main__ import PATTERNS
from experiments.report import record
from experiments.running import arguments, results
from experiments.running.runner import Runner

SCORES = ("magnitude", "obs", "obd", "mixture", "auto")
METHODS = (*SCORES, *(f"{scores}+group" for scores in SCORES), "default")
# title: field of the results, decimals
COLUMNS = {
    "loss": ("loss", 4),
    "accuracy, %": ("accuracy", 2),
    "loss, again": ("recalibrated_loss", 4),
    "accuracy, again": ("recalibrated_accuracy", 2),
}


def options_of(method: str, state: object, args: argparse.Namespace) -> dict:
    """Arguments of `prune_one_shot` for a method: its scores, and a compensation or none."""
    if method == "default":
        return {}
    scores, _, group = method.partition("+")
    solve = {"iterations": args.iterations, "attempts": args.attempts}
    return {
        "saliency": scores,
        "compensation": flj.compensation.group(**solve) if group else flj.compensation.none(),
        # candidates are compared on a fifth of the examples, which the fit then must not have seen
        "stages": 1 if scores == "auto" else flj.Stages(1, state=state),
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("pattern", "examples", "iterations", "attempts")}


def table(rows: Sequence[Mapping[str, Any]]) -> record.Table:
    """A row for each method, the median and the range over seeds in each column.

    Args:
        rows: the objects of `results.json` for one network and pattern.
    """
    first = rows[0]
    spec, settings = MODELS[first["model"]], first["settings"]
    columns = {title: column for title, column in COLUMNS.items() if column[0] in first}
    if spec.mean is not None:
        columns = {"loss": COLUMNS["loss"], "squared error": COLUMNS["accuracy, %"]}
    fields, decimals = zip(*columns.values(), strict=True)
    cells = [["dense", *(first.get(f"dense_{field}") for field in fields)]]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        cells.append([name, *(record.spread([row[field] for row in own]) for field in fields)])
    return record.Table(
        title=f"{spec.name}, {settings['pattern']} at {first['sparsity_target']:.0%}",
        columns=["", *columns],
        rows=cells,
        decimals=[0, *decimals],
        seed=record.seeds(rows),
        data=f"{spec.dataset}, {settings['prunable_weights']:,} prunable weights",
        examples=f"{settings['examples']:,} training examples for the curvature; all test examples",
        note=f"{record.MEDIANS}; loss in nats an example. Group solves of at most "
        f"{settings['iterations']} iterations, dampings tried: {settings['attempts']}.",
    )


def _runs(
    args: argparse.Namespace,
    spec: Spec,
    data: datasets.Data,
    dense: results.Dense,
    seed: int,
    missing: Sequence[str],
) -> Any:
    """The objects of one seed: one fit, then each method that is still missing."""
    batches = cases.curvature_batches(
        data.train, dense.constants, examples=args.examples, batch_size=spec.batch, seed=seed
    )
    estimator, key = flj.inverse.fishleg(spec.model), jax.random.key(seed)
    begin = time.process_time()
    state = flj.fit(estimator, dense.params, batches, key=key)
    fit_seconds = time.process_time() - begin
    for method in missing:
        begin = time.process_time()
        result = flj.prune_one_shot(
            spec.model,
            dense.params,
            estimator,
            batches,
            sparsity=args.sparsity,
            pattern=PATTERNS[args.pattern],
            prunable=spec.prunable,
            key=key,
            **options_of(method, state, args),
        )
        yield results.made(
            result,
            spec,
            dense,
            data,
            settings={
                **_settings(args),
                "chosen": [stage.get("saliency", "") for stage in result.stages],
            },
            method=method,
            sparsity_target=args.sparsity,
            seed=seed,
            fit_cpu_seconds=fit_seconds,
            prune_cpu_seconds=time.process_time() - begin,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command("experiments.one_shot.patterns", "Prune a network to a pattern.")
    add, option = parser.add_argument, arguments.option
    out = Path("results/patterns")
    add("--model", choices=MODELS, default="transformer", help="default: transformer")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="trained weights; default: the shared ones, or trained",
    )
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist or cifar10")
    add("--pattern", choices=PATTERNS, default="2:4", help="default: 2:4")
    option(parser, "--sparsity", arguments.sparsity, 0.5)
    one = arguments.one_of(METHODS)
    option(parser, "--method", one, METHODS, f"of {', '.join(METHODS)}", several=True)
    option(parser, "--examples", arguments.at_least(1), 512, "for the curvature")
    option(parser, "--iterations", arguments.at_least(1), 25, "of the group solve")
    option(parser, "--attempts", arguments.at_least(1), 3, "dampings of the group solve")
    option(parser, "--seed", arguments.seed, [0], several=True)
    add("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    args = parser.parse_args(argv)
    spec = MODELS[args.model]
    with arguments.refusing(parser, args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        params, constants, _ = cases.network(
            spec.name, train_in=args.out, checkpoint=args.checkpoint, data_dir=args.data_dir
        )
        data = datasets.load(spec.dataset, args.data_dir)
    runner = Runner(args.out / "results.json")
    dense = results.evaluated(spec, data, params, constants)
    for seed in args.seed:
        identity = {
            "model": spec.name,
            "sparsity_target": args.sparsity,
            "seed": seed,
            "settings": _settings(args),
        }
        missing = runner.missing(identity, [{"method": method} for method in args.method])
        names = [one["method"] for one in missing]
        for row in _runs(args, spec, data, dense, seed, names) if names else ():
            runner.keep(row)
            print(f"seed {seed}  {row['method']:16} loss {row['loss']:.4f}", flush=True)
    made = table(runner.rows)
    print(made)
    print(runner.path)
    record.keep(args.record, made, "experiments.one_shot.patterns", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
