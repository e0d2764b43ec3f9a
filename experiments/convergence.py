"""Shows that FishLeg's auxiliary loss converges with the library's defaults, model by model.

    python -m experiments.convergence
    python -m experiments.convergence --model mlpnet,resnet20

Networks without a checkpoint in the shared folder are trained a short while first, and kept in
`--out`.  Prints a table and writes `convergence.json` and `convergence.png`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import fishleg_jax as flj
from experiments import cases, files, plots, tables
from experiments.arguments import comma_list, one_of
from experiments.fitting import fit
from experiments.models import MODELS


def converge(case: cases.Case, seed: int) -> tuple[dict, list[float]]:
    """Fits the inverse Fisher of a network with the defaults.

    Args:
        case: the network and its data.
        seed: for the fit.

    Returns:
        An object for `convergence.json`, and the smoothed auxiliary loss after every update that
        learned.  `seconds` includes the compilation.
    """
    estimator = flj.inverse.fishleg(case.spec.model)
    losses = []
    begin = time.perf_counter()
    state = fit(
        estimator,
        case.params,
        case.batches,
        key=jax.random.key(seed),
        name=case.spec.name,
        watch=lambda state: losses.append(state.auxiliary_loss),
    )
    seconds = time.perf_counter() - begin
    # while the start is gathered from data there is no loss yet
    learning = [value for value in map(float, losses) if np.isfinite(value)]
    row = {
        "model": case.spec.name,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(case.params)),
        "updates": len(losses),
        "batch_size": len(case.batches[0][0]),
        "auxiliary_loss_start": learning[0],
        "auxiliary_loss_end": learning[-1],
        "relative_residual": float(state.relative_residual),
        "seconds": seconds,
        "seed": seed,
    }
    return row, learning


def show(rows: Sequence[dict]) -> str:
    """The objects of `convergence.json` as a table."""
    header = ["model", "weights", "updates", "batch", "loss, start", "loss, end", "residual", "s"]
    cells = [
        [
            row["model"],
            f"{row['weights']:,}",
            str(row["updates"]),
            str(row["batch_size"]),
            f"{row['auxiliary_loss_start']:.4g}",
            f"{row['auxiliary_loss_end']:.4g}",
            f"{row['relative_residual']:.3f}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    return tables.table(header, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convergence", description="Fit FishLeg with its defaults."
    )
    add = parser.add_argument
    add(
        "--model",
        type=comma_list(one_of(MODELS)),
        default=list(MODELS),
        metavar="A,B",
        help=f"of {', '.join(MODELS)}; default: all",
    )
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist and cifar10")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("results/convergence"))
    args = parser.parse_args(argv)
    try:
        for name in args.model:
            cases.check(name, args.data_dir)
    except ValueError as error:
        parser.error(str(error))
    rows, losses = [], {}
    for name in args.model:
        case = cases.load(name, train_in=args.out, data_dir=args.data_dir, seed=args.seed)
        row, losses[name] = converge(case, args.seed)
        rows.append(row)
    print(show(rows))
    print(files.write_json(args.out / "convergence.json", rows))
    print(plots.convergence(args.out / "convergence.png", losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
