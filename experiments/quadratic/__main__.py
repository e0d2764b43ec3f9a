"""Shows how well each estimate's quadratic model predicts the loss along the pruning direction.

    python -m experiments.quadratic
    python -m experiments.quadratic --model mlpnet --checkpoint mlpnet_mnist.npz --sparsity 0.8

A method prunes a network once; δ is how its weights change.  Along `w + tδ` the loss on training
images that the curvature has not seen is measured, and set beside what the method takes it to be,
`t gᵀδ + ½ t² δᵀF̂δ` with the gradient g on the curvature's images (Singh & Alistarh, WoodFisher,
2020, the section on the local quadratic model).  F̂ is the undamped Fisher that the estimate is the
inverse of, see `experiments.quadratic.forms`; that of magnitude is the identity, whose scale means
nothing.  The exact Fisher of the same images says how much of an error is that of the estimate, and
how much that of any quadratic model.

Then every method prunes at many dampings, see `experiments.quadratic.damping`.  Prints two tables
and writes `quadratic.json`, `quadratic.png`, `damping.json` and `damping.png` (and the weights,
where it trained them) into `--out`.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import numpy as np

from experiments.data import datasets
from experiments.estimates import methods
from experiments.models import checkpoints, training
from experiments.models.specs import Spec
from experiments.quadratic import damping, plots, pruning
from experiments.quadratic.forms import exact_form, gradient_slopes, quadratic_form
from experiments.quadratic.pruning import Case, Fitted
from experiments.report import record, tables
from experiments.running import arguments, files, results

DEFAULT = ("magnitude", "diagonal", "kfac", "woodfisher", "mfac", "fishleg")
DAMPINGS = [10.0**n for n in range(-8, 3)]
COLUMNS = {
    "loss increase": "{method}",
    "damping": "{damping:.1e}",
    "measured": "{measured:.4g}",
    "predicted": "{predicted:.4g}",
    "ratio": "{ratio:.3g}",
    "error over t": "{error:.3g}",
    "ratio, exact Fisher": "{ratio_exact:.3g}",
    "residual": "{residual:.0e}",
}
POINTS = np.linspace(0, 1, 11)  # t


def predict(method: str, case: Case, estimate: Fitted) -> dict:
    """Measures and predicts the loss along the direction in which a method prunes.

    Args:
        method: its name.
        case: the network and its data.
        estimate: the fitted method.

    Returns:
        An object of `quadratic.json`.  All losses are increases in nats per example, by the points
        `t`; `error` is the mean of |predicted − measured| over that of |measured|, since ratios
        point by point have next to nothing below them where t is small.
    """
    model, params, constants = case.spec.model, case.dense.params, case.dense.constants
    pruned = pruning.prune(case, estimate).params
    delta = jax.tree.map(lambda new, old: new - old, pruned, params)

    slopes = gradient_slopes(model, params, estimate.batches, delta, case.part.each)
    form = quadratic_form(method, estimate.estimator, estimate.state, delta, slopes)
    exact = exact_form(model, params, estimate.batches, delta)

    def increases(curvature):
        return POINTS * slopes.mean() + 0.5 * POINTS**2 * curvature

    def loss(t):
        moved = jax.tree.map(lambda w, d: w + t * d, params, delta)
        return training.evaluate(model, moved, case.calibration, constants)[1]

    losses = np.array([loss(float(t)) for t in POINTS])
    measured, predicted = losses - losses[0], increases(form.value)
    return {
        "method": method,
        "damping": float(estimate.state.damping) if hasattr(estimate.state, "damping") else None,
        "t": POINTS.tolist(),
        "measured": measured.tolist(),
        "predicted": predicted.tolist(),
        "predicted_exact": increases(exact).tolist(),
        "ratio": predicted[-1] / measured[-1],
        "ratio_exact": increases(exact)[-1] / measured[-1],
        "error": np.abs(predicted - measured).mean() / np.abs(measured).mean(),
        "slope": slopes.mean(),
        "form": form.value,
        "form_exact": exact,
        "residual": form.residual,
        "fit_seconds": estimate.seconds,
        "calibration_examples": len(case.calibration[0]),
        **pruning.fields(case),
    }


def show(rows: Sequence[dict]) -> str:
    """The objects of `quadratic.json` as a table, with the increases at t = 1."""
    ends = [{name: row[name][-1] for name in ("measured", "predicted")} for row in rows]
    solved = [{"residual": row["residual"] or None} for row in rows]
    return tables.of_rows(
        [row | end | one for row, end, one in zip(rows, ends, solved, strict=True)], COLUMNS
    )


def _parser() -> argparse.ArgumentParser:
    parser = arguments.pruning_parser(
        "experiments.quadratic",
        "Show how well quadratic models predict the loss, and what the damping does.",
        methods=methods.METHODS,
        default=DEFAULT,
        several=False,
    )
    parser.add_argument(
        "--dampings",
        type=arguments.comma_list(arguments.positive),
        default=DAMPINGS,
        metavar="A,B",
        help="default: 1e-8,1e-7,...,1e2",
    )
    record.add_option(parser)
    return parser


def _check(args: argparse.Namespace, spec: Spec, split: datasets.Data) -> None:
    images = len(split.train[0])
    if args.examples is None:
        args.examples = min(methods.GRADIENTS, images // 2)
    if args.examples == images:
        raise ValueError(
            f"--examples {images}: {spec.dataset} has {images} images to train on, and some of "
            "them are needed to measure the loss on"
        )
    params, _ = jax.eval_shape(spec.init, jax.random.key(0))
    for method in args.method:  # whether it fits into memory
        estimator = pruning.make_estimator(method, spec, methods.share(args.examples))
        jax.eval_shape(estimator.init, params)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    args, spec, split, loaded = arguments.parse(_parser(), argv, _check)
    params, constants = loaded or training.train(
        spec, split.train, epochs=args.epochs, seed=args.seed
    )
    if loaded is None:
        path = args.out / f"{spec.name}_seed{args.seed}.npz"
        print(checkpoints.save(path, params, constants))
    part = methods.share(args.examples)
    curvature, calibration = pruning.divide(split.train, part.examples, args.seed)
    dense = results.evaluated(spec, split, params, constants)
    case = Case(args, spec, dense, curvature, calibration, split.test, part)
    predictions, swept = [], []
    for method in args.method:
        estimate = pruning.fitted(method, case)
        predictions.append(predict(method, case, estimate))
        swept += damping.sweep(method, case, estimate, args.dampings)
    made = damping.table(swept, args.dampings, case)
    print(show(predictions), made.title, made, sep="\n\n")
    print(files.write_json(args.out / "quadratic.json", predictions))
    print(plots.quadratic(args.out / "quadratic.png", predictions))
    print(files.write_json(args.out / "damping.json", swept))
    print(plots.damping(args.out / "damping.png", swept))
    record.keep(args.record, made, "experiments.quadratic", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
