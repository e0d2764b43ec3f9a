"""Times building the inverse Fisher of m gradients, with its diagonal, against the textbook way.

    python -m experiments.benchmarks.woodbury
    python -m experiments.benchmarks.woodbury --weights 30000 --gradients 500 --repeats 3

The textbook way is one update of rank one for every gradient, `F⁻¹ ← F⁻¹ − vvᵀ / (m + gᵀv)` with
`v = F⁻¹g`: in one block without a matrix, each v being made of all v before it (Singh & Alistarh
2020, equation 3; Frantar et al. 2021, section 3.1), and in blocks of c with matrices of c×c.  Both
are kept here as the reference, compiled and in place, beside `flj.inverse.mfac` and `woodfisher`.

The gradients are those of a linear model at zero weights and targets of -1, which are its inputs:
normal, of a falling scale.  They are made batch by batch, which is not timed, so that there is one
matrix of them at most.  Every case runs in a process of its own, whose largest resident size less
that before is the memory; the cases take turns, and medians are compared.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.benchmarks.textbook import block_recursion, recursion, start, start_blocks
from experiments.estimates.methods import AT_ONCE
from experiments.report import record
from experiments.running import arguments, memory

# case -> what it is compared with
CASES = {
    "textbook": "textbook",
    "mfac": "textbook",
    "woodfisher": "textbook",
    "textbook_blocks": "textbook_blocks",
    "woodfisher_blocks": "textbook_blocks",
}
COLUMNS = {
    "case": "{case}",
    "seconds": "{seconds:.2f}",
    "times as fast": "{times:.2f}",
    "memory, MB": "{megabytes:.0f}",
    "over gradients": "{share:.2f}",
    "difference": "{difference:.1e}",
}
SMALL = {"weights": 1000, "gradients": 100}


class Batches(Sequence):
    """Batches that are made when they are asked for.

    Attributes:
        seconds: how long it took to make them, all in all.
    """

    def __init__(self, weights: int, gradients: int):
        """Batches of `AT_ONCE` examples and a smaller last one: `gradients` examples in all.

        Args:
            weights: d.
            gradients: m.
        """
        self.sizes = [min(AT_ONCE, gradients - i) for i in range(0, gradients, AT_ONCE)]
        self.seconds = 0.0
        scale = (1 + jnp.arange(weights)) ** -0.25
        row = lambda key: jax.random.normal(key, scale.shape) * scale
        # row by row: random numbers for all at once would take as much as three batches more
        self._make = jax.jit(lambda keys: (jax.lax.map(row, keys), -jnp.ones(len(keys))))

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple:
        """The batch, made anew."""
        begin = time.perf_counter()
        keys = jax.random.split(jax.random.key(index), self.sizes[index])
        batch = jax.block_until_ready(self._make(keys))
        self.seconds += time.perf_counter() - begin
        return batch


def make_build(
    case: str, *, weights: int, gradients: int, damping: float, block_size: int
) -> Callable[[Sequence[tuple]], jax.Array]:
    """Makes the function that builds an estimate from batches and returns its diagonal.

    Args:
        case: a name in `CASES`.
        weights: d.
        gradients: m.
        damping: γ.
        block_size: c, of the cases with blocks.
    """
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    params = jnp.zeros(weights)
    if case == "textbook":
        step = partial(recursion, gradients=gradients, damping=damping)
        begin = partial(start, weights, gradients, damping)
        diagonal = lambda state: state.diagonal
    elif case == "textbook_blocks":
        step = partial(block_recursion, gradients=gradients)
        begin = partial(start_blocks, weights, block_size, damping)
        diagonal = lambda state: jnp.diagonal(state, axis1=1, axis2=2).reshape(-1)[:weights]
    else:
        if case == "mfac":
            estimator = flj.inverse.mfac(model, damping, window=gradients)
        else:
            size = block_size if case == "woodfisher_blocks" else None
            estimator = flj.inverse.woodfisher(model, damping, gradients=gradients, block_size=size)
        wait = lambda done, total, state: jax.block_until_ready(state)
        key, inverse_diagonal = jax.random.key(0), jax.jit(estimator.diagonal)
        return lambda batches: inverse_diagonal(
            flj.fit(estimator, params, batches, key=key, on_update=wait), params
        )

    update = jax.jit(
        lambda state, batch: step(state, flj.per_example_gradients(model, params, batch)),
        donate_argnums=0,
    )
    diagonal = jax.jit(diagonal)

    def build(batches):
        state = begin()
        for i in range(len(batches)):
            state = jax.block_until_ready(update(state, batches[i]))
        return diagonal(state)

    return build


def measure(case: str, problem: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """Builds an estimate in this process, once to compile and once for the time.

    Args:
        case: a name in `CASES`.
        problem: the arguments of `make_build`.

    Returns:
        `seconds` without making the batches, and `bytes`, by which this process was larger at its
        largest than before: gradients, estimate and all; and the diagonal.
    """
    # so that jax and its compiler are in the size before
    make_build(case, **problem | SMALL)(Batches(SMALL["weights"], SMALL["gradients"]))
    before = memory.in_use()
    build = make_build(case, **problem)
    weights, gradients = problem["weights"], problem["gradients"]
    few = gradients % AT_ONCE + (AT_ONCE if gradients >= AT_ONCE else 0)  # all shapes of batches
    jax.block_until_ready(build(Batches(weights, few)))
    batches, begin = Batches(weights, gradients), time.perf_counter()
    diagonal = jax.block_until_ready(build(batches))
    seconds = time.perf_counter() - begin - batches.seconds
    largest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "bytes": largest - before}, np.asarray(diagonal)


def compare(problem: dict[str, Any], repeats: int) -> list[dict]:
    """All cases in turn, each time in a fresh process.

    Args:
        problem: the arguments of `make_build`.
        repeats: how often each is measured.

    Returns:
        For each case the medians, and the largest relative difference of its diagonal from that of
        what it is compared with.
    """
    found: dict[str, list[dict]] = {case: [] for case in CASES}
    diagonals = {}
    for _ in range(repeats):
        for case in CASES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                row, diagonals[case] = process.submit(measure, case, problem).result()
            found[case].append(row)
    return [
        {
            "case": case,
            "seconds": statistics.median(row["seconds"] for row in found[case]),
            "bytes": statistics.median(row["bytes"] for row in found[case]),
            "difference": float(np.max(np.abs(diagonals[case] / diagonals[reference] - 1))),
        }
        for case, reference in CASES.items()
    ]


def table(rows: Sequence[dict], weights: int, gradients: int) -> record.Table:
    """The rows of `compare` as a table.

    Args:
        rows: the rows.
        weights: d.
        gradients: m.
    """
    seconds = {row["case"]: row["seconds"] for row in rows}
    return record.of_rows(
        "The estimate of many gradients, and its diagonal",
        [
            row
            | {
                "times": seconds[CASES[row["case"]]] / row["seconds"],
                "megabytes": row["bytes"] / 1e6,
                "share": row["bytes"] / (4 * gradients * weights),
            }
            for row in rows
        ],
        COLUMNS,
        seed="0",
        data=f"gradients of a linear model: normal, of a falling scale; {weights:,} weights",
        examples=f"{gradients:,} gradients",
        note="Speed relative to the textbook's recursion with blocks of the same size; "
        "memory over that of the gradients; the largest relative difference of the diagonals.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command(
        "experiments.benchmarks.woodbury",
        "Time WoodFisher and M-FAC against the textbook recursion.",
    )
    option, count = partial(arguments.option, parser), arguments.at_least(1)
    option("--weights", count, 270_000)
    option("--gradients", count, 1000)
    option("--damping", arguments.positive, 1e-3)
    option("--block-size", count, 128, "of the cases with blocks")
    option("--repeats", count, 1)
    record.add_option(parser)
    args = parser.parse_args(argv)
    problem = {k: v for k, v in vars(args).items() if k not in ("repeats", "record")}
    made = table(compare(problem, args.repeats), args.weights, args.gradients)
    print(made)
    record.keep(args.record, made, "experiments.benchmarks.woodbury", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
