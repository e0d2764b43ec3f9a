"""Times training with `fishleg_prune` at its defaults against the same training without it.

    python -m experiments.benchmarks.training_step
    python -m experiments.benchmarks.training_step --case cnn --repeats 10

Both are the jitted loss, its gradient and Adam, always on one batch.  They alternate in cycles of
two hundred steps, in which two mask updates and one batch that is assimilated fall, and the ratio
is that of whole cycles: of what a user waits for, whose loop does not wait for every step.  Its
spread is over cycles.  Beside it stand the medians of single steps of a last cycle, each waited
for: without pruning, with masks that are held, with a mask update, and with a batch that is
assimilated besides; and the residual `‖F_γQu − u‖ / ‖u‖` that the estimate has in the end.

On the CPU a step that needs more than 32 MiB of temporary memory is slowed down by glibc, which
takes it from the system each time: `experiments.benchmarks.allocator` says what to do about it.

Convolutional networks choose between two compiled steps on the host, see
`fishleg_jax.fishleg_prune`; `--host` makes all do so.  Weights are those of the shared folder, and
random ones where it has none.
"""

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
from experiments.benchmarks import allocator
from experiments.benchmarks.timing import seconds
from experiments.gradual.plans import START, told
from experiments.models import cases
from experiments.report import tables
from experiments.running import network_arguments
from experiments.running.arguments import at_least, option

CASES = ("autoencoder", "mlpnet", "cnn", "resnet20")
CONVOLUTIONS = ("cnn", "resnet20")
AUX_EVERY, MASK_EVERY = 200, 100  # the defaults of `fishleg_prune`
COLUMNS = {  # of steps in milliseconds
    "case": "{case}",
    "weights": "{weights}",
    "allocator": "{allocator}",
    "batch": "{batch}",
    "plain": "{plain_ms:.2f}",
    "held": "{held_ms:.2f}",
    "masks": "{mask_ms:.2f}",
    "masks and batch": "{assimilating_ms:.2f}",
    "ratio": "{ratio}",
    "residual": "{relative_residual:.2f}",
    "pruned to": "{sparsity:.1%}",
}


class Training:
    """Training on one batch, that goes on where the last call has left it.

    Attributes:
        count: number of steps made.
        state: that of the optimiser.
    """

    def __init__(self, case: cases.Case, tx: optax.GradientTransformation, work: Callable):
        """Starts it; `work` maps a step's number to the arguments of `update` beside the batch."""
        tx = optax.with_extra_args_support(tx)

        def step(params, state, batch, work):
            grads = jax.grad(partial(flj.loss, case.spec.model))(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch, **dict(work))
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, static_argnums=3, donate_argnums=(0, 1))
        self._work, self._batch = work, case.batches[0]
        self._params = jax.tree.map(jnp.copy, case.params)
        self.count, self.state = 0, jax.jit(tx.init)(self._params)

    def _one(self) -> Any:
        self.count += 1
        self._params, self.state = self._step(
            self._params, self.state, self._batch, tuple(self._work(self.count).items())
        )
        return self._params

    def cycle(self) -> float:
        """Makes the steps of one cycle, and gives the seconds that all take together."""
        return seconds(lambda: [self._one() for _ in range(AUX_EVERY)][-1])

    def steps(self, number: int) -> dict[int, float]:
        """Makes some, and gives the seconds of each by its number."""
        numbers = range(self.count + 1, self.count + number + 1)
        return {n: seconds(self._one) for n in numbers}


def chosen(step: int) -> dict[str, bool]:
    """Arguments of `update` in a loop that chooses between compiled steps on the host."""
    return told(step <= START or step % AUX_EVERY == 0, step % MASK_EVERY == 0)


def measure(case: cases.Case, *, repeats: int, host: bool) -> dict[str, Any]:
    """Trains with and without pruning in turn.

    Args:
        case: the network and its data.
        repeats: number of timed cycles of each.
        host: whether the host chooses the steps that do more than hold masks.

    Returns:
        Milliseconds a step, ratios, and the residual of the estimate.
    """
    # the start of the estimate and all compilation are no part of a cycle
    warm = -(-START // AUX_EVERY) * AUX_EVERY
    schedule = flj.schedules.cubic(0.95, begin=1, end=warm + (repeats + 2) * AUX_EVERY)
    pruning = flj.fishleg_prune(case.spec.model, schedule, prunable=case.spec.prunable)
    nothing = lambda n: {}
    plain = Training(case, optax.adam(1e-3), nothing)
    pruned = Training(case, optax.chain(optax.adam(1e-3), pruning), chosen if host else nothing)
    plain.steps(AUX_EVERY)
    pruned.steps(warm)
    ratios = []
    for _ in tqdm(range(repeats), desc=case.spec.name, disable=None):
        one, other = plain.cycle(), pruned.cycle()
        ratios.append(other / one)
    without, steps = plain.steps(AUX_EVERY).values(), pruned.steps(AUX_EVERY)
    milliseconds = lambda times: 1000 * statistics.median(times)
    found = flj.check(pruned.state)
    return {
        "case": f"{case.spec.name}{', host' if host else ''}",
        "weights": "trained" if case.spec.checkpoint else "random",
        "allocator": allocator.name(),
        "batch": len(case.batches[0][0]),
        "plain_ms": milliseconds(without),
        "held_ms": milliseconds([t for n, t in steps.items() if n % MASK_EVERY]),
        "mask_ms": milliseconds(
            [t for n, t in steps.items() if n % MASK_EVERY == 0 and n % AUX_EVERY]
        ),
        "assimilating_ms": milliseconds([t for n, t in steps.items() if n % AUX_EVERY == 0]),
        "ratio": tables.spread(ratios, 3),
        "relative_residual": float(pruned.state[-1].estimate.relative_residual),
        "sparsity": found.sparsity,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = network_arguments.make_parser(
        "experiments.benchmarks.training_step",
        "Time training with fishleg_prune against training without it.",
        CASES,
        option="--case",
        default=["autoencoder"],
    )
    add = parser.add_argument
    add("--train-in", type=Path, help="train networks without a checkpoint, and keep them here")
    option(parser, "--repeats", at_least(1), 10, "cycles of each")
    add("--host", action="store_true", help="choose between two compiled steps on the host")
    args = network_arguments.parse(parser, argv)
    rows = []
    for name in args.model:
        case = cases.load(name, train_in=args.train_in, data_dir=args.data_dir)
        host = args.host or name in CONVOLUTIONS
        rows.append(measure(case, repeats=args.repeats, host=host))
    print(tables.of_rows(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
