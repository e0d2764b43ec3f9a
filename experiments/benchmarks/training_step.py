"""Times training with `fishleg_prune` at its defaults against the same training without it.

    python -m experiments.benchmarks.training_step
    python -m experiments.benchmarks.training_step --case cnn --repeats 10

Both are the jitted loss, its gradient and Adam, always on one batch.  They alternate in cycles of
the fifty steps from one mask update to the next, and the ratio is that of whole cycles: of what a
user waits for, the batches that are assimilated and the mask update with it.  Its spread is over
cycles.  Beside it stand the medians of single steps, without pruning, with masks that are held,
with an assimilation and with a mask update besides, and the residual `‖F_γQu − u‖ / ‖u‖` that the
estimate has in the end.

Convolutional networks choose between two compiled steps on the host, see
`fishleg_jax.fishleg_prune`; `--host` makes all do so.  Weights are those of the shared folder, and
random ones where it has none.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import fishleg_jax as flj
from experiments import cases, tables
from experiments.arguments import at_least, comma_list, one_of
from experiments.benchmarks.timing import seconds
from experiments.gradual_plan import START

CASES = ("autoencoder", "mlpnet", "cnn", "resnet20")
CONVOLUTIONS = ("cnn", "resnet20")
AUX_EVERY, MASK_EVERY = 10, 50  # the defaults of `fishleg_prune`


class Training:
    """Training on one batch, that goes on where the last call has left it.

    Attributes:
        count: how many steps were made.
        state: that of the optimiser.
    """

    def __init__(self, case: cases.Case, tx: optax.GradientTransformation, choose: Callable):
        """Starts it; `choose` says of a step's number what is handed on as `assimilate`."""
        tx = optax.with_extra_args_support(tx)

        def step(params, state, batch, assimilate):
            grads = jax.grad(partial(flj.loss, case.spec.model))(params, batch)
            extra = {"batch": batch, "assimilate": assimilate}
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, static_argnums=3, donate_argnums=(0, 1))
        self._choose, self._batch = choose, case.batches[0]
        self._params = jax.tree.map(jnp.copy, case.params)
        self.count, self.state = 0, jax.jit(tx.init)(self._params)

    def _one(self) -> Any:
        self.count += 1
        self._params, self.state = self._step(
            self._params, self.state, self._batch, self._choose(self.count)
        )
        return self._params

    def steps(self, number: int) -> dict[int, float]:
        """Makes some, and gives the seconds of each by its number."""
        numbers = range(self.count + 1, self.count + number + 1)
        return {n: seconds(self._one) for n in numbers}


def measure(case: cases.Case, *, repeats: int, host: bool) -> dict[str, Any]:
    """Trains with and without pruning in turn.

    Args:
        case: the network and its data.
        repeats: how many cycles of each are timed.
        host: whether the host chooses the steps at which a batch is assimilated.

    Returns:
        Milliseconds a step, ratios, and the residual of the estimate.
    """
    # the start of the estimate and all compilation are no part of a cycle
    warm = -(-START // MASK_EVERY) * MASK_EVERY
    schedule = flj.schedules.cubic(0.95, begin=1, end=warm + (repeats + 1) * MASK_EVERY)
    pruning = flj.fishleg_prune(case.spec.model, schedule, prunable=case.spec.prunable)
    chosen = lambda n: n <= START or n % AUX_EVERY == 0
    nothing = lambda n: None
    plain = Training(case, optax.adam(1e-3), nothing)
    pruned = Training(case, optax.chain(optax.adam(1e-3), pruning), chosen if host else nothing)
    plain.steps(MASK_EVERY)
    pruned.steps(warm)
    ratios, steps, without = [], {}, []
    for _ in tqdm(range(repeats), desc=case.spec.name, disable=None):
        one, other = plain.steps(MASK_EVERY), pruned.steps(MASK_EVERY)
        ratios.append(sum(other.values()) / sum(one.values()))
        without += one.values()
        steps |= other
    milliseconds = lambda times: 1000 * statistics.median(times)
    found = flj.check(pruned.state)
    return {
        "case": f"{case.spec.name}{', host' if host else ''}",
        "weights": "trained" if case.spec.checkpoint else "random",
        "batch": len(case.batches[0][0]),
        "plain_ms": milliseconds(without),
        "held_ms": milliseconds([t for n, t in steps.items() if n % AUX_EVERY]),
        "assimilating_ms": milliseconds(
            [t for n, t in steps.items() if n % AUX_EVERY == 0 and n % MASK_EVERY]
        ),
        "mask_ms": milliseconds([t for n, t in steps.items() if n % MASK_EVERY == 0]),
        "ratios": ratios,
        "relative_residual": float(pruned.state[-1].estimate.relative_residual),
        "sparsity": found.sparsity,
    }


def show(rows: Sequence[dict]) -> str:
    """The measurements as a table; steps in milliseconds."""
    header = ["case", "weights", "batch", "plain", "held", "assimilating", "mask update", "ratio"]
    cells = [
        [
            row["case"],
            row["weights"],
            str(row["batch"]),
            *(f"{row[f'{n}_ms']:.2f}" for n in ("plain", "held", "assimilating", "mask")),
            tables.spread(row["ratios"], 3),
            f"{row['relative_residual']:.2f}",
            f"{100 * row['sparsity']:.1f} %",
        ]
        for row in rows
    ]
    return tables.table([*header, "residual", "pruned to"], cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.training_step",
        description="Time training with fishleg_prune against training without it.",
    )
    add = parser.add_argument
    add(
        "--case",
        type=comma_list(one_of(CASES)),
        default=["autoencoder"],
        metavar="A,B",
        help=f"of {', '.join(CASES)}; default: autoencoder",
    )
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist and cifar10")
    add("--train-in", type=Path, help="train networks without a checkpoint, and keep them here")
    add("--repeats", type=at_least(1), default=10, help="cycles of each; default: 10")
    add("--host", action="store_true", help="choose between two compiled steps on the host")
    args = parser.parse_args(argv)
    try:
        for name in args.case:
            cases.check(name, args.data_dir)
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for name in args.case:
        case = cases.load(name, train_in=args.train_in, data_dir=args.data_dir)
        host = args.host or name in CONVOLUTIONS
        rows.append(measure(case, repeats=args.repeats, host=host))
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
