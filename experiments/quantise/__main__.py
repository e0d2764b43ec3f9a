"""Prunes and quantises layers as one QUBO: solvers by energy and seconds, and the network's loss.

    python -m experiments.quantise
    python -m experiments.quantise --model resnet20 --bits 2 --sparsity 0.5

The weights into one output are a block, with the second moment of what they see as their Fisher (up
to a factor for the output, which changes nothing).  First the solvers are compared on a few blocks:
small ones, of the 12 weights of a row with the largest scores and 6 zeros, by energies over the
lowest of all possibilities (brute force), and whole rows by energies over that of rounding the
weights with the largest scores; and by seconds without compilation.  `annealing` and `hard penalty`
sample the QUBO with soft penalties on the number of zeros, and with one ten times the largest
change by one weight; both end by the best moves, unless it says `without moves`.  A solver that
ends above rounding returns rounding, as the library does.  Then every layer is quantised, by
rounding and by moves, with the inputs of the dense network; biases, norms and the output layer
stay.  Scales are the same for all solvers.  The second moments are those of training examples,
accuracies those of test examples.

Writes `results.json`, an object for each solver and network of a seed, and `energies.png` into
`--out`; the same command goes on after it was stopped.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import datasets
from experiments.models import cases
from experiments.models.specs import MODELS
from experiments.quantise import networks, plots, solving
from experiments.report import record
from experiments.running import arguments, results
from experiments.running.runner import Runner

SIZES = (f"{networks.SMALL} weights", "rows")
HOW = ("dense", "rounding", "moves")
OVER = {"rounding": "energy over rounding's", solving.BEST: "energy over the lowest"}


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command("experiments.quantise", "Prune and quantise as one QUBO.")
    option, out = arguments.option, Path("results/quantise")
    one = arguments.one_of(arguments.CLASSIFIERS)
    option(parser, "--model", one, "mlp", f"of {', '.join(arguments.CLASSIFIERS)}")
    parser.add_argument("--data-dir", type=Path, help="where TensorFlow Datasets has its data")
    option(parser, "--bits", arguments.at_least(0), 0, "of a kept weight, besides its sign")
    option(parser, "--sparsity", arguments.sparsity, 0.7)
    option(parser, "--blocks", arguments.at_least(1), 8, "of each size, to compare solvers")
    option(parser, "--examples", arguments.at_least(1), 1024, "for the second moments")
    option(parser, "--seed", arguments.seed, [0], several=True)
    parser.add_argument("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    return parser


def solvers_of(size: str) -> tuple[str, ...]:
    """Names of the solvers of blocks of one size; only small ones have brute force."""
    return solving.SOLVERS if size == "rows" else (*solving.SOLVERS, solving.BEST)


def run_seed(args: argparse.Namespace, seed: int, runner: Runner) -> None:
    """Solvers on the blocks of one network, and the network quantised, as far as not yet stored."""
    spec = MODELS[args.model]
    params, constants, train = cases.network(
        spec.name, train_in=args.out, data_dir=args.data_dir, seed=seed
    )
    identity = {
        "model": spec.name,
        "seed": seed,
        "weights_before": results.fingerprint(params),
        "settings": {name: getattr(args, name) for name in ("bits", "sparsity", "examples")},
    }
    of_blocks = identity | {"settings": identity["settings"] | {"blocks": args.blocks}}
    wanted = [{"size": size, "solver": name} for size in SIZES for name in solvers_of(size)]
    missing = runner.missing(of_blocks, wanted)
    missing_networks = runner.missing(identity, [{"how": how} for how in HOW])
    if not missing and not missing_networks:
        return
    batches = cases.curvature_batches(
        train, constants, examples=args.examples, batch_size=spec.batch, seed=seed
    )
    layers = networks.layers_of(spec, params, batches)
    blocks = networks.blocks_of(layers, args.blocks, args.sparsity, seed)
    for one in missing:
        found = solving.measured(one["solver"], blocks[one["size"]], args.bits, seed)
        runner.keep({**of_blocks, **one, **found})
    if missing_networks:
        data = datasets.load(spec.dataset, args.data_dir)
        dense = results.evaluated(spec, data, params, constants)
        measure = functools.partial(networks.measured, sparsity=args.sparsity, bits=args.bits)
        for one in missing_networks:
            runner.keep({**identity, **one, **measure(one["how"], spec, dense, layers, data)})


def compared(rows: Sequence[Mapping[str, Any]], size: str, to: str) -> list[dict[str, Any]]:
    """Solvers of blocks of one size over all seeds.

    Args:
        rows: Objects of `results.json`.
        size: One of `SIZES`.
        to: Solver whose energies are the unit.

    Returns:
        For each solver `energies` of all blocks in that unit, and mean `seconds` of one; none if
        that solver has no results.
    """
    by = {(row["solver"], row["seed"]): row for row in rows if row.get("size") == size}
    seeds = list(dict.fromkeys(seed for _, seed in by))
    if not all((to, seed) in by for seed in seeds):
        return []
    found = []
    for solver in solvers_of(size):
        own = [(by[solver, seed], by[to, seed]) for seed in seeds]
        ratios = [
            x / y
            for row, unit in own
            for x, y in zip(row["energies"], unit["energies"], strict=True)
        ]
        seconds = float(np.mean([row["seconds"] for row, _ in own]))
        found.append({"solver": solver, "energies": ratios, "seconds": seconds})
    return found


def table(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> record.Table:
    """Energies and seconds of the solvers, and the networks.

    Args:
        rows: Objects of `results.json`.
        args: The arguments.
    """
    cells: list[list[record.Cell]] = []
    for size in SIZES:
        over = {to: compared(rows, size, to) for to in OVER}
        for i, row in enumerate(over["rounding"]):
            ratios = [record.spread(own[i]["energies"]) if own else None for own in over.values()]
            cells.append([f"{size}: {row['solver']}", *ratios, row["seconds"], None, None])
    for how in HOW:
        own = [row for row in rows if row.get("how") == how]
        spreads = [record.spread([row[field] for row in own]) for field in ("accuracy", "loss")]
        cells.append([f"network: {how}", None, None, None, *spreads])
    return record.Table(
        title=f"{args.model}, {args.sparsity:.0%} zeros and {args.bits} bits besides the sign",
        columns=["", *OVER.values(), "seconds a block", "accuracy, %", "loss"],
        rows=cells,
        decimals=[0, 3, 3, 4, 2, 4],
        seed=record.seeds(rows),
        data=MODELS[args.model].dataset,
        examples=f"{args.examples:,} training examples for second moments; all test examples",
        note=f"Median over {args.blocks} blocks of each seed, or over seeds, with the least and "
        f"the largest; blocks of {networks.SMALL} weights have {networks.SMALL // 2} zeros.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: The arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    runner = Runner(args.out / "results.json")
    with arguments.refusing(parser, args.out):
        cases.check(args.model, args.data_dir)
        results.load(runner.path)
        args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        run_seed(args, seed, runner)
    made = table(runner.rows, args)
    print(made)
    panels = {
        (size, OVER[to]): compared(runner.rows, size, to)
        for size, to in zip(SIZES, reversed(OVER), strict=True)
    }
    print(plots.draw(args.out / "energies.png", panels))
    print(runner.path)
    record.keep(args.record, made, "experiments.quantise", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
