"""Times what `prune_one_shot` costs apart from numerics: magnitude pruning on a small network.

    python -m experiments.benchmarks.overhead [--against COMMIT] [--repeats 8]

A 784-40-20-10 network is pruned to 0.9 by magnitude.  The first call compiles; the time of the
second and the smallest of the next ten are overhead of Python, of dispatch and of checks.  Each
repeat is a fresh process.  With `--against`, repeats alternate with those of another commit,
checked out in a temporary worktree, and the ratios of the medians are printed: in wall-clock time,
and in CPU time of the process, which is steadier on a busy machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SIZES = (784, 40, 20, 10)
ROOT = Path(__file__).parents[2]
FIGURES = ("second wall", "second cpu", "later wall", "later cpu")


def measure() -> dict[str, float]:
    """Times of the second call and of the fastest of ten later ones, in milliseconds."""
    # Imported here, so that the library can be that of another checkout.
    import jax
    import jax.numpy as jnp

    import fishleg_jax as flj

    keys = jax.random.split(jax.random.key(0), len(SIZES) + 1)
    shapes = list(zip(SIZES, SIZES[1:], strict=False))
    params = {
        f"dense_{i}": {
            "kernel": jax.random.normal(keys[i], shape) / shape[0] ** 0.5,
            "bias": jnp.zeros(shape[1]),
        }
        for i, shape in enumerate(shapes)
    }

    def predict(params, x):
        for i in range(len(shapes)):
            layer = params[f"dense_{i}"]
            x = x @ layer["kernel"] + layer["bias"]
            x = jnp.tanh(x) if i < len(shapes) - 1 else x
        return x

    model = flj.Model(predict, flj.likelihoods.categorical())
    batch = (
        jax.random.normal(keys[-2], (100, SIZES[0])),
        jax.random.randint(keys[-1], (100,), 0, SIZES[-1]),
    )
    estimator = flj.inverse.identity()

    def call():
        wall, cpu = time.perf_counter(), time.process_time()
        result = flj.prune_one_shot(model, params, estimator, [batch], sparsity=0.9)
        jax.block_until_ready(result.params)
        return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)

    call()
    second, later = call(), [call() for _ in range(10)]
    return dict(zip(FIGURES, (*second, *map(min, zip(*later, strict=True))), strict=True))


def in_process(checkout: Path) -> dict[str, float]:
    """Figures of `measure` from a fresh process with the library of a checkout."""
    # This file runs as a script, so that the other checkout need not have it.
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--once"]
    run = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def compare(checkouts: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of the figures of each checkout, measured in turn."""
    runs: dict[str, list] = {name: [] for name in checkouts}
    for _ in range(repeats):
        for name, checkout in checkouts.items():
            runs[name].append(in_process(checkout))
    return {
        name: {figure: statistics.median(run[figure] for run in own) for figure in FIGURES}
        for name, own in runs.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement.

    Args:
        argv: Arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.overhead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--against", help="commit to compare with")
    parser.add_argument("--repeats", type=int, default=8, help="processes for each side")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.once:
        print(json.dumps(measure()))
        return 0
    checkouts = {"here": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        if options.against:
            other = Path(folder) / "other"
            checkouts[options.against] = other
            subprocess.run(
                [*git, "add", "--quiet", "--detach", str(other), options.against], check=True
            )
        try:
            medians = compare(checkouts, options.repeats)
        finally:
            if options.against:
                subprocess.run([*git, "remove", "--force", str(other)], check=True)
    print("milliseconds, medians of", options.repeats, "processes")
    for figure in FIGURES:
        numbers = [own[figure] for own in medians.values()]
        ratio = f"  ratio {numbers[0] / numbers[1]:.2f}" if len(numbers) > 1 else ""
        print(f"{figure:12}", *(f"{number:8.1f}" for number in numbers), ratio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
