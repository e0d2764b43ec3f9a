"""Times one auxiliary update of FishLeg against one gradient step on the same batch.

    python -m experiments.benchmarks.auxiliary_step
    python -m experiments.benchmarks.auxiliary_step --case mlpnet --repeats 50

The gradient step is the jitted loss with its gradient, without an optimizer.  The auxiliary step
is the jitted `update` of the estimator that learns, Fisher product and λ update in one, after
a whole fit, whose relative residual stands beside it.  The two alternate, and medians are compared.
Weights are those of the shared folder, and random ones where it has none.
"""

import statistics
import sys
from collections.abc import Sequence

import jax

import fishleg_jax as flj
from experiments.benchmarks.timing import seconds
from experiments.estimates.fitting import fit
from experiments.models import cases
from experiments.report import tables
from experiments.running import arguments, network_arguments

CASES = ("mlpnet", "resnet20", "autoencoder")
COLUMNS = {
    "case": "{case}",
    "weights": "{weights}",
    "batch": "{batch}",
    "gradient, ms": "{gradient_ms:.2f}",
    "update, ms": "{update_ms:.2f}",
    "ratio": "{ratio:.2f}",
    "residual": "{relative_residual:.3f}",
}


def measure(case: cases.Case, *, repeats: int, updates: int | None) -> dict:
    """Fits an estimator, then times its update and a gradient in turn.

    Args:
        case: the network and its data.
        repeats: number of timed calls of each.
        updates: of the fit; None for the library's default.

    Returns:
        The medians in milliseconds, their ratio, and the residual of the fit.
    """
    model = case.spec.model
    estimator = flj.inverse.fishleg(
        model, learn=True, **({} if updates is None else {"updates": updates})
    )
    key = jax.random.key(0)
    state = fit(estimator, case.params, case.batches, key=key, name=case.spec.name)
    gradient = jax.jit(lambda params, batch: jax.value_and_grad(flj.loss, 1)(model, params, batch))
    update = jax.jit(estimator.update)
    batch = case.batches[0]
    pair = (
        lambda: gradient(case.params, batch),
        lambda: update(state, case.params, batch, key),
    )
    for function in pair:
        seconds(function)  # compiles
    times = [[seconds(function) for function in pair] for _ in range(repeats)]
    medians = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    return {
        "case": case.spec.name,
        "weights": "trained" if case.spec.checkpoint else "random",
        "batch": len(batch[0]),
        "gradient_ms": medians[0],
        "update_ms": medians[1],
        "ratio": medians[1] / medians[0],
        "relative_residual": float(state.relative_residual),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = network_arguments.make_parser(
        "experiments.benchmarks.auxiliary_step",
        "Time an auxiliary update of FishLeg against a gradient step.",
        CASES,
        option="--case",
    )
    arguments.option(parser, "--repeats", arguments.at_least(1), 30)
    parser.add_argument(
        "--updates", type=arguments.at_least(3), help="of the fit before; default: the library's"
    )
    args = network_arguments.parse(parser, argv)
    rows = []
    for name in args.model:
        case = cases.load(name, train_in=None, data_dir=args.data_dir)
        rows.append(measure(case, repeats=args.repeats, updates=args.updates))
    print(tables.of_rows(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
