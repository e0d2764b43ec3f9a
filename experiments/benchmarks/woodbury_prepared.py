"""Times products and diagonals of a prepared state of M-FAC, against the published algorithm.

    python -m experiments.benchmarks.woodbury_prepared
    python -m experiments.benchmarks.woodbury_prepared --gradients 64,512

Rows are a window of random gradients, compiled and in one process: of M-FAC at each damping, and
the published algorithm (Frantar et al. 2021, section 3.1) with its own state already made,
`F⁻¹ x = x / γ − Uᵀ U x` and `1 / γ − Σ u²` with m vectors u of every block.  Rounds alternate
between all rows, and the fastest of each is reported.
"""

import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import seconds
from experiments.report import record
from experiments.running import arguments
from fishleg_jax.inverse._woodbury import window as _window
from fishleg_jax.inverse._woodbury.groups import make_groups

DAMPINGS = 0.1, 1e-3, 1e-5
PRODUCTS = 10
COLUMNS = {
    "gradients": "{gradients}",
    "case": "{case}",
    "prepare, s": "{prepare:.4f}",
    "diagonal, s": "{diagonal:.4f}",
    "product, s": "{product:.4f}",
    "sum, s": "{sum:.3f}",
    "ratio": "{ratio:.2f}",
}


@jax.jit
def published_product(vectors: jax.Array, damping: jax.Array, x: jax.Array) -> jax.Array:
    """The published product for vectors u (blocks, m, size) and x (blocks, size)."""
    inner = jnp.einsum("bms,bs->bm", vectors, x)
    return x / damping - jnp.einsum("bms,bm->bs", vectors, inner)


@jax.jit
def published_diagonal(vectors: jax.Array, damping: jax.Array) -> jax.Array:
    """The published diagonal for vectors u (blocks, m, size)."""
    return 1 / damping - jnp.sum(vectors**2, axis=1)


def measure(weights: int, gradients: int, block_size: int | None, repeats: int) -> dict:
    """For each row the fastest `(prepare, diagonal, product)` in seconds.

    Args:
        weights: d.
        gradients: m.
        block_size: c; None for one block.
        repeats: number of rounds.
    """
    (group,) = make_groups(jax.ShapeDtypeStruct((weights,), jnp.float32), block_size)
    shape = group.blocks, gradients, group.size
    scale = (1 + jnp.arange(group.blocks * group.size)) ** -0.25
    rows = jax.random.normal(jax.random.key(0), shape) * scale.reshape(group.blocks, 1, group.size)
    window = _window.empty(group, gradients, jnp.float32)
    window = jax.jit(_window.push)(window, [rows], jnp.arange(gradients))
    count, x = jnp.asarray(gradients), rows[:, 0]
    prepare, diagonal, multiply = map(
        jax.jit, (_window.prepare, _window.diagonal, _window.multiply)
    )
    calls = {}
    for damping in map(jnp.float32, DAMPINGS):
        made = window, count, damping
        root = prepare(*made)
        calls[f"mfac, damping {damping:g}"] = (
            (prepare, *made),
            (diagonal, *made, root),
            (multiply, *made, [x], root),
        )
    # numbers do not matter to the time, and the gradients are there already
    calls["published"] = (
        None,
        (published_diagonal, rows, jnp.float32(1e-3)),
        (published_product, rows, jnp.float32(1e-3), x),
    )
    best = {}
    for i in range(repeats + 1):  # the first compiles
        for name, row in calls.items():
            new = [None if call is None else seconds(partial(*call)) for call in row]
            if i > 1:
                pairs = zip(best[name], new, strict=True)
                new = [None if b is None else min(a, b) for a, b in pairs]
            best[name] = new
    return best


def rows_of(best: dict, gradients: int) -> list[dict]:
    """The result of `measure` as rows; the ratio is over the sum at the largest damping."""
    names = "prepare", "diagonal", "product"
    rows = [
        {"gradients": gradients, "case": case, **dict(zip(names, row, strict=True))}
        for case, row in best.items()
    ]
    for row in rows:
        made = row["prepare"] is not None  # what is published has its state already
        total = row["prepare"] + row["diagonal"] + PRODUCTS * row["product"] if made else None
        row["sum"] = total
        row["ratio"] = total / rows[0]["sum"] if made else None
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command(
        "experiments.benchmarks.woodbury_prepared",
        "Time products and diagonals of prepared states of M-FAC.",
    )
    option, count = partial(arguments.option, parser), arguments.at_least(1)
    option("--weights", count, 53_000)
    option("--gradients", count, [64], several=True)
    option("--block-size", arguments.at_least(0), 0, "0 for one block of everything")
    option("--repeats", count, 3)
    record.add_option(parser)
    args = parser.parse_args(argv)
    size = args.block_size or None
    made = record.of_rows(
        "Readouts of a prepared M-FAC state",
        [
            row
            for gradients in args.gradients
            for row in rows_of(measure(args.weights, gradients, size, args.repeats), gradients)
        ],
        COLUMNS,
        seed="0",
        data=f"random gradients of a falling scale; {args.weights:,} weights, "
        + (f"blocks of {size}" if size else "one block"),
        examples="the gradients in the table",
        note=f"Seconds, the fastest of {args.repeats}; the sum has one preparation, one diagonal "
        f"and {PRODUCTS} products, and the ratio is over that at the largest damping.",
    )
    print(made)
    record.keep(args.record, made, "experiments.benchmarks.woodbury_prepared", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
