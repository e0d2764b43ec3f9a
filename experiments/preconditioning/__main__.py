"""Compares estimates of the inverse Fisher as preconditioners of the group update.

    python -m experiments.preconditioning
    python -m experiments.preconditioning --model mlpnet --sparsity 0.9 --damping 1e-2,1e-3

The group update solves `(F_KK + γ) x = F_KS w_S` over the kept weights K by conjugate gradients,
with exact Fisher products on training images.  Here that system is solved from zero with each
estimate for a preconditioner, and with `none`.  The mask is the same for all: that of the OBS
scores of the diagonal estimate at its own default damping, whatever γ is.  An estimate is fitted
to the same images at the γ of the solve: to the kept weights of that mask (`--fit current`), or to
the dense network and then cut to the mask (`--fit dense`).

Networks without a checkpoint in the shared folder are trained first, and kept in `--out`.  Prints
a table for every system, and writes `results.json` and `preconditioning.png`; `history` in the
former has the relative residual, the quadratic model's rise of the loss and the seconds after
every iteration, without compilation, which `fit_seconds` includes.  The same command goes on after
it was stopped, and computes nothing again that is in `results.json`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fishleg_jax as flj
from experiments.data import datasets
from experiments.estimates import methods
from experiments.models.specs import MODELS
from experiments.preconditioning import solving, table
from experiments.preconditioning.case import NONE, Network
from experiments.report import plots
from experiments.running import arguments, network_arguments, results
from experiments.running.arguments import at_least, one_of, positive, seed, sparsity
from experiments.running.runner import Runner

PRECONDITIONERS = [NONE, *(name for name in methods.METHODS if name != "magnitude")]
DEFAULT = [NONE, "diagonal", "kfac", "fishleg_start", "fishleg"]
EXAMPLES = 1000


def _parser() -> argparse.ArgumentParser:
    parser = network_arguments.make_parser(
        "experiments.preconditioning",
        "Compare preconditioners of the group update.",
        MODELS,
        default=["cnn"],
    )
    add, option = parser.add_argument, partial(arguments.option, parser)
    option(
        "--method",
        one_of(PRECONDITIONERS),
        DEFAULT,
        f"of {', '.join(PRECONDITIONERS)}",
        several=True,
    )
    option("--sparsity", sparsity, [0.9], several=True)
    option("--damping", positive, [1e-2], "γ, of the solve and of the estimates", several=True)
    how = "current: to the kept weights, dense: to all weights"
    option("--fit", one_of(("current", "dense")), ["current"], how, several=True)
    option("--tolerance", positive, [1e-1, 1e-2, 1e-3], "relative residuals", several=True)
    option("--seed", seed, [0], several=True)
    option("--iterations", at_least(1), 100, "of a solve at most")
    option("--examples", at_least(1), EXAMPLES, "training images of all Fishers")
    add("--updates", type=at_least(3), help="of FishLeg; default: the library's")
    add("--epochs", type=at_least(1), help="of training, where there is no checkpoint")
    option("--out", Path, Path("results/preconditioning"))
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in args.model:
        images = len(datasets.load(MODELS[name].dataset, args.data_dir).train[0])
        if args.examples > images:
            raise ValueError(f"--examples {args.examples}: {name} has {images} to train on")
    results.load(args.out / "results.json")


def _wanted(args: argparse.Namespace) -> Iterator[tuple[float, str, str | None, float]]:
    """All γ, methods, fits and sparsities; where nothing is fitted there is one fit, None."""
    for damping in args.damping:
        for method in args.method:
            for how in [None] if method == NONE else args.fit:
                for target in args.sparsity:
                    yield damping, method, how, target


def run(args: argparse.Namespace, name: str, number: int) -> list[dict]:
    """All systems and preconditioners of one network, without those that are there already.

    Args:
        args: the arguments.
        name: the model.
        number: the seed, for the training, the choice of images and the fits.

    Returns:
        The objects of `results.json` that belong to the arguments.
    """
    network, runner = Network(args, name, number), Runner(args.out / "results.json")
    spec, curvature, dense = network.spec, None, (None, None)
    for damping, method, how, target in _wanted(args):
        own = {} if method == NONE else methods.settings_of(method, **network.given(damping))
        identity = {
            "method": method,
            "dataset": spec.dataset,
            "model": name,
            "sparsity_target": target,
            "damping": damping,
            "fit": how,
            "seed": number,
            "curvature_examples": network.part.examples,
            "settings": {
                "weights": network.weights,
                "prunable": results.prunable(spec),
                "iterations": args.iterations,
                "tolerance": min(args.tolerance),
                **own,
            },
        }
        if not runner.missing(identity, [{}]):
            continue
        curvature = curvature or flj.curvature(spec.model, network.batches(spec.batch))
        masks = network.masks(target)
        if how != "dense":
            fitted = network.fitted(method, damping, masks)
        else:
            # one fit serves all sparsities, which follow one another
            if dense[0] != (damping, method):
                dense = (damping, method), network.fitted(method, damping, None)
            fitted = dense[1]
        runner.keep({**identity, **_solved(network, curvature, masks, damping, *fitted)})
    return runner.rows


def _solved(
    network: Network,
    curvature: flj.Curvature,
    masks: Any,
    damping: float,
    estimator: flj.InverseFisher,
    state: Any,
    fit_seconds: float,
) -> dict[str, Any]:
    args = network.args
    system = solving.make_system(curvature, network.params, masks, damping)
    _, record = solving.solve(
        system, estimator, state, iterations=args.iterations, tolerance=min(args.tolerance)
    )
    pruned = flj.apply_masks(network.params, masks)
    return {
        "sparsity": flj.sparsity(pruned, network.spec.prunable),
        "iterations": len(record.residual) - 1,
        "residual": record.residual[-1],
        "true_residual": record.true_residual,
        "cost": record.cost[-1],
        "uncompensated_cost": system.cost,
        "sound": record.sound,
        "fit_seconds": fit_seconds,
        "solve_seconds": record.seconds[-1],
        "history": {name: getattr(record, name) for name in ("residual", "cost", "seconds")},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    args = network_arguments.parse(_parser(), argv, _check)
    rows = [row for name in args.model for number in args.seed for row in run(args, name, number)]
    print(table.show(rows, args.tolerance))
    print(args.out / "results.json")
    print(plots.preconditioning(args.out / "preconditioning.png", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
