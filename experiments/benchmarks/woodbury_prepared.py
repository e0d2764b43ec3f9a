"""Times products and diagonals of a prepared state of M-FAC, against the published algorithm.

    python -m experiments.benchmarks.woodbury_prepared
    python -m experiments.benchmarks.woodbury_prepared --gradients 512

Rows are a window of random gradients, compiled and in one process: of M-FAC at each damping, and
the published algorithm (Frantar et al. 2021, section 3.1) with what it keeps already made,
`F⁻¹ x = x / γ − Uᵀ U x` and `1 / γ − Σ u²` with m vectors u of every block.  Rounds alternate
between all rows, and the fastest of each is told.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.report import tables
from experiments.running.arguments import at_least
from fishleg_jax.inverse import _window
from fishleg_jax.inverse._groups import make_groups

DAMPINGS = 0.1, 1e-3, 1e-5
PRODUCTS = 10


@jax.jit
def published_product(vectors: jax.Array, damping: jax.Array, x: jax.Array) -> jax.Array:
    """The published product for vectors u (blocks, m, size) and x (blocks, size)."""
    inner = jnp.einsum("bms,bs->bm", vectors, x)
    return x / damping - jnp.einsum("bms,bm->bs", vectors, inner)


@jax.jit
def published_diagonal(vectors: jax.Array, damping: jax.Array) -> jax.Array:
    """The published diagonal for vectors u (blocks, m, size)."""
    return 1 / damping - jnp.sum(vectors**2, axis=1)


def seconds(function, *arguments) -> float:
    """The time of one call that has been compiled."""
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def measure(weights: int, gradients: int, block_size: int | None, repeats: int) -> dict:
    """For each row the fastest `(prepare, diagonal, product)` in seconds.

    Args:
        weights: d.
        gradients: m.
        block_size: c; None for one block.
        repeats: how many rounds there are.
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
            new = [float("nan") if call is None else seconds(*call) for call in row]
            old = best.get(name, new)
            best[name] = new if i <= 1 else [min(a, b) for a, b in zip(old, new, strict=True)]
    return best


def show(best: dict) -> str:
    """What `measure` found as a table; the last column is over that at the largest damping."""
    total = {k: p + d + PRODUCTS * m for k, (p, d, m) in best.items()}
    header = ["case", "prepare, s", "diagonal, s", "product, s", "sum, s", "ratio"]
    first = next(iter(total.values()))
    cells = [
        [
            name,
            *(f"{v:.4f}" for v in best[name]),
            f"{total[name]:.3f}",
            f"{total[name] / first:.2f}",
        ]
        for name in best
    ]
    return tables.table(header, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.woodbury_prepared",
        description="Time products and diagonals of prepared states of M-FAC.",
    )
    add = parser.add_argument
    add("--weights", type=at_least(1), default=53_000, help="default: 53000")
    add("--gradients", type=at_least(1), default=64, help="default: 64")
    add("--block-size", type=at_least(0), default=0, help="default: 0, one block of everything")
    add("--repeats", type=at_least(1), default=3, help="default: 3")
    args = parser.parse_args(argv)
    print(show(measure(args.weights, args.gradients, args.block_size or None, args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
