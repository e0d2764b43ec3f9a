"""Prunes a trained network in one shot with several methods and shows what is left of it.

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
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

import fishleg_jax as flj
from experiments import checkpoints, data, files, plots, tables, training
from experiments.arguments import parse
from experiments.cases import curvature_batches
from experiments.fitting import fit
from experiments.models import Spec


class Dense(NamedTuple):
    """A trained network and how good it is: accuracy in percent, loss in nats per example."""

    params: Any
    constants: Any
    accuracy: float
    loss: float


def make_estimator(method: str, spec: Spec, args: argparse.Namespace) -> flj.inverse.InverseFisher:
    """The inverse Fisher of a method, with the settings that a user gave.

    Args:
        method: `fishleg`, `fishleg_start` (its closed-form start, nothing learned) or `magnitude`.
        spec: the model.
        args: the arguments; a damping or number of updates of None is the library's default.
    """
    if method == "magnitude":
        return flj.inverse.identity()
    given = {"damping": args.damping, "updates": args.updates}
    if method == "fishleg_start":
        given = {"damping": args.damping, "learn": False}
    chosen = {name: value for name, value in given.items() if value is not None}
    return flj.inverse.fishleg(spec.model, **chosen)


def _measured(state: Any) -> dict[str, float]:
    # only the learned inverse has these
    names = ("damping", "auxiliary_loss", "relative_residual")
    return {name: float(getattr(state, name)) for name in names if hasattr(state, name)}


def prune(
    method: str, spec: Spec, dense: Dense, split: data.Data, args: argparse.Namespace, seed: int
) -> list[dict]:
    """Prunes a network with one method to every sparsity.

    One fit serves all sparsities; `seconds` is the time of that fit (with its compilation) plus
    that of pruning to the sparsity at hand, without the evaluation.

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
    compensate = getattr(flj.compensation, compensation)()
    if magnitude:
        batches = batches[:1]  # the engine asks for data, the identity does not look at them
    key = jax.random.key(seed)
    estimator = make_estimator(method, spec, args)
    begin = time.perf_counter()
    state = fit(estimator, dense.params, batches, key=key, name=method)
    fit_seconds = time.perf_counter() - begin
    settings = {
        "scope": args.scope,
        "compensation": compensation,
        "updates": 0 if magnitude else estimator.updates,
        "batch_size": 0 if magnitude else len(batches[0][0]),
        "prunable": spec.prunable or "leaves with two or more dimensions",
        **_measured(state),
    }
    results = []
    for target in tqdm(args.sparsity, desc=f"pruning, {method}", disable=None):
        begin = time.perf_counter()
        result = flj.prune_one_shot(
            spec.model,
            dense.params,
            estimator,
            batches,
            sparsity=target,
            scope=args.scope,
            compensation=compensate,
            prunable=spec.prunable,
            key=key,
            state=state,
        )
        params = jax.block_until_ready(result.params)
        seconds = fit_seconds + time.perf_counter() - begin
        accuracy, loss = training.evaluate(spec.model, params, split.test, dense.constants)
        results.append(
            {
                "method": method,
                "dataset": spec.dataset,
                "model": spec.name,
                "sparsity_target": target,
                "sparsity": flj.sparsity(params, spec.prunable),
                "accuracy": accuracy,
                "dense_accuracy": dense.accuracy,
                "loss": loss,
                "dense_loss": dense.loss,
                "seconds": seconds,
                "curvature_examples": 0 if magnitude else len(batches) * len(batches[0][0]),
                "seed": seed,
                "settings": settings | {"prunable_weights": result.report.total.weights},
            }
        )
    return results


def run(args: argparse.Namespace, spec: Spec, split: data.Data, loaded: Any) -> list[dict]:
    """All methods and seeds.

    Args:
        args: the arguments.
        spec: the model.
        split: the data set.
        loaded: trained parameters and constants; None to train.

    Returns:
        The objects of `results.json`.
    """
    results = []
    for seed in args.seed:
        params, constants = loaded or training.train(
            spec, split.train, epochs=args.epochs, seed=seed
        )
        if loaded is None:
            print(checkpoints.save(args.out / f"{spec.name}_seed{seed}.npz", params, constants))
        score = training.evaluate(spec.model, params, split.test, constants)
        dense = Dense(params, constants, *score)
        for method in args.method:
            results += prune(method, spec, dense, split, args, seed)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    args, spec, split, loaded = parse(argv)
    results = run(args, spec, split, loaded)
    print(tables.accuracies(results))
    print(files.write_json(args.out / "results.json", results))
    print(plots.accuracy_vs_sparsity(args.out / "accuracy_vs_sparsity.png", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
