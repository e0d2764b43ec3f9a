"""Prunes a trained network in one shot with several methods, and compares the accuracies.

    python -m experiments.one_shot
    python -m experiments.one_shot --model mlpnet --checkpoint mlpnet_mnist.npz --seed 0,1,2

Writes `results.json` and `accuracy_vs_sparsity.png` (and the weights, where it trained them) into
`--out`, and prints the accuracies.  The curvature sees training images only, the evaluation test
images only.  With several seeds the table shows medians.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

import fishleg_jax as flj
from experiments.data import datasets
from experiments.estimates.fitting import fit
from experiments.estimates.methods import make_estimator
from experiments.models import checkpoints, training
from experiments.models.cases import curvature_batches
from experiments.models.specs import Spec
from experiments.report import plots, record, tables
from experiments.running import arguments, files, memory, processes, results

NAMES = ("fishleg", "fishleg_start", "magnitude")
PATTERNS = {
    "2:4": flj.patterns.n_m(2, 4),
    "blocks4x4": flj.patterns.blocks((4, 4)),
    "units": flj.patterns.units(),
}


def prune(
    method: str,
    spec: Spec,
    dense: results.Dense,
    split: datasets.Data,
    args: argparse.Namespace,
    seed: int,
) -> list[dict]:
    """Prunes a network with one method to every sparsity.

    With a compensation that is named, one fit serves all sparsities in a single stage; `seconds` is
    then the time of that fit (with its compilation) plus that of pruning to the sparsity at hand,
    without the evaluation.

    Args:
        method: see `make_estimator`.
        spec: the model.
        dense: the trained network.
        split: the data set.
        args: the arguments.
        seed: for the choice of examples and for the fit.

    Returns:
        The objects of `results.json`, one for each sparsity.
    """
    examples, batch_size = args.examples or spec.examples, args.batch_size or spec.batch
    batches = curvature_batches(
        split.train, dense.constants, examples=examples, batch_size=batch_size, seed=seed
    )
    magnitude = method == "magnitude"
    compensation = "none" if magnitude else args.compensation
    chosen = compensation == "default"  # scores, compensation and stages are the library's choice
    options = {"stages": flj.Stages(examples_per_chunk=args.examples_per_chunk)}
    if not chosen:
        options["compensation"] = getattr(flj.compensation, compensation)()
    if magnitude:
        batches = batches[:1]  # the engine asks for data, the identity does not look at them
    key = jax.random.key(seed)
    estimator = make_estimator(
        method,
        spec.model,
        damping=args.damping,
        updates=args.updates,
        examples_per_chunk=args.examples_per_chunk,
    )
    begin = time.perf_counter()
    predicted = flj.peak_memory(estimator, dense.params, batches[0]).peak
    state, fit_seconds = None, 0.0
    if not chosen:
        with memory.watch() as peak:
            state = fit(estimator, dense.params, batches, key=key, name=method)
            measured = peak()
        fit_seconds = time.perf_counter() - begin
        options["stages"] = options["stages"]._replace(state=state)
        if not magnitude:
            print(memory.told(method, predicted, measured))
    settings = {
        "scope": args.scope,
        "compensation": compensation,
        "updates": 0 if magnitude else estimator.updates,
        "batch_size": 0 if magnitude else len(batches[0][0]),
        "prunable": results.prunable(spec),
        **({"pattern": args.pattern} if args.pattern else {}),
        **({} if magnitude else arguments.memory_settings(args)),
    }
    rows = []
    for target in tqdm(args.sparsity, desc=f"pruning, {method}", disable=None):
        begin = time.perf_counter()
        result = flj.prune_one_shot(
            spec.model,
            dense.params,
            estimator,
            batches,
            sparsity=target,
            scope=args.scope,
            pattern=PATTERNS.get(args.pattern),
            prunable=spec.prunable,
            key=key,
            **options,
        )
        jax.block_until_ready(result.params)
        seconds = fit_seconds + time.perf_counter() - begin
        rows.append(
            results.made(
                result,
                spec,
                dense,
                split,
                settings={
                    **settings,
                    **results.measured(result.state),
                    "stages_taken": len(result.stages),
                    "saliency": [stage.get("saliency", "obs") for stage in result.stages],
                },
                method=method,
                sparsity_target=target,
                seconds=seconds,
                curvature_examples=0 if magnitude else len(batches) * len(batches[0][0]),
                seed=seed,
            )
        )
    return rows


def run(args: argparse.Namespace, spec: Spec, split: datasets.Data, loaded: Any) -> list[dict]:
    """All methods and seeds.

    Args:
        args: the arguments.
        spec: the model.
        split: the data set.
        loaded: trained parameters and constants; None to train.

    Returns:
        The objects of `results.json`.
    """
    rows = []
    for seed in args.seed:
        params, constants = loaded or training.train(
            spec, split.train, epochs=args.epochs, seed=seed
        )
        if loaded is None:
            print(checkpoints.save(args.out / f"{spec.name}_seed{seed}.npz", params, constants))
        params, constants = processes.everywhere((params, constants))
        dense = results.evaluated(spec, split, params, constants)
        for method in args.method:
            rows += prune(method, spec, dense, split, args, seed)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = arguments.pruning_parser(
        "experiments.one_shot",
        "Prune a trained network in one shot and compare methods.",
        methods=NAMES,
        default=("fishleg", "magnitude"),
        compensations=("default", "independent", "group", "none"),
    )
    add = parser.add_argument
    add("--pattern", choices=PATTERNS, help="weights that go together; 2:4 has its own sparsity")
    add("--damping", type=arguments.positive, help="default: the library's")
    add("--batch-size", type=arguments.at_least(1), help="images in one batch of the curvature")
    add(
        "--updates",
        type=arguments.at_least(3),
        help="auxiliary updates of FishLeg; default: the library's",
    )
    arguments.add_memory_options(parser)
    processes.add_options(parser)
    record.add_option(parser)
    return parser


def _check(args: argparse.Namespace, spec: Spec, split: datasets.Data) -> None:
    """Raises a ValueError where a batch of the curvature can't be dealt out to all devices."""
    examples = args.examples or spec.examples
    processes.check_dealt(
        min(args.batch_size or spec.batch, examples, len(split.train[0])), "--batch-size"
    )
    if args.pattern == "2:4":
        args.sparsity = [PATTERNS["2:4"].highest]


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
        rows = run(args, spec, split, loaded)
        print(tables.accuracies(rows))
        print(files.write_json(args.out / "results.json", rows))
        print(plots.accuracy_vs_sparsity(args.out / "accuracy_vs_sparsity.png", rows))
        record.keep_accuracies(args.record, rows, "experiments.one_shot", argv, len(split.test[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
