"""Prunes any of the models to a pattern, and says how much is scores and how much compensation.

    python -m experiments.one_shot.patterns --model transformer --checkpoint transformer_seed0.npz
    python -m experiments.one_shot.patterns --model resnet20 --pattern blocks4x4 --sparsity 0.5

Prints a table of the loss on examples that nothing has seen, in nats per example, for magnitudes
and for the scores of FishLeg, each without compensation and with the group solve, and for the
library's default.  The curvature sees training examples only, the loss test examples only.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import checkpoints
from experiments.models.cases import curvature_batches
from experiments.models.specs import MODELS, as_batch
from experiments.one_shot.__main__ import PATTERNS
from experiments.running import arguments, files

SCORES = ("magnitude", "obs", "obd", "mixture")
METHODS = (*SCORES, *(f"{scores}, group" for scores in SCORES), "default")


def options_of(method: str, state: object) -> dict:
    """Arguments of `prune_one_shot` for a method: its scores, and a compensation or none."""
    if method == "default":
        return {}
    scores, _, compensation = method.partition(", ")
    return {
        "saliency": scores,
        "compensation": getattr(flj.compensation, compensation or "none")(),
        "stages": flj.Stages(1, state=state),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command("experiments.one_shot.patterns", "Prune a network to a pattern.")
    add = parser.add_argument
    add("--model", choices=MODELS, default="transformer", help="default: transformer")
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights; default: the shared ones")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist or cifar10")
    add("--pattern", choices=PATTERNS, default="2:4", help="default: 2:4")
    add("--sparsity", type=arguments.sparsity, default=0.5, help="default: 0.5")
    add("--method", choices=METHODS, nargs="+", default=METHODS, help="default: all")
    add("--examples", type=arguments.at_least(1), default=512, help="for the curvature; 512")
    add("--test", type=arguments.at_least(1), default=1000, help="test examples; 1000")
    add("--seed", type=arguments.seed, nargs="+", default=[0], help="default: 0")
    args: argparse.Namespace = parser.parse_args(argv)
    spec = MODELS[args.model]
    try:
        path = args.checkpoint or files.shared(spec.checkpoint or "")
        params, constants = checkpoints.load(path, spec)
        data = datasets.load(spec.dataset, args.data_dir)
    except ValueError as error:
        parser.error(str(error))
    loss = jax.jit(lambda p, b: flj.loss(spec.model, p, b))
    parts = [np.arange(args.test)[i : i + 100] for i in range(0, args.test, 100)]

    def measured(params: object) -> float:
        rows = [as_batch(*(x[part] for x in data.test), constants) for part in parts]
        sizes = [len(part) for part in parts]
        each = [float(loss(params, batch)) for batch in rows]
        return float(np.average(each, weights=sizes))

    print(f"{args.model}, {args.pattern}: dense loss {measured(params):.4f}", flush=True)
    for seed in args.seed:
        batches = curvature_batches(
            data.train, constants, examples=args.examples, batch_size=spec.batch, seed=seed
        )
        estimator, key = flj.inverse.fishleg(spec.model), jax.random.key(seed)
        state = flj.fit(estimator, params, batches, key=key)
        for method in args.method:
            begin = time.process_time()
            result = flj.prune_one_shot(
                spec.model,
                params,
                estimator,
                batches,
                sparsity=args.sparsity,
                pattern=PATTERNS[args.pattern],
                prunable=spec.prunable,
                key=key,
                **options_of(method, state),
            )
            seconds = time.process_time() - begin
            chosen = [stage.get("saliency", "") for stage in result.stages]
            print(
                f"seed {seed}  {method:17} loss {measured(result.params):8.4f}  sparsity "
                f"{result.report.total.sparsity:.4f}  {seconds:4.0f} s  {', '.join(chosen)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
