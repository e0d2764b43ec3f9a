"""Counts the files and functions of the library that one `prune_one_shot` enters.

    python -m experiments.benchmarks.trip

Two arrays are pruned by half with each estimate, with `sys.setprofile` noting every function of
`fishleg_jax` that Python enters, tracing included.  `<lambda>` and comprehensions do not count as
functions of their own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.report import tables

ROOT = Path(flj.__file__).parent
METHODS: dict[str, Callable[[flj.Model], flj.InverseFisher]] = {
    "magnitude": lambda model: flj.inverse.identity(),
    "diagonal": lambda model: flj.inverse.diagonal(model),
    "kfac": lambda model: flj.inverse.kfac(model),
    "fishleg": lambda model: flj.inverse.fishleg(model),
}


def entered(run: Callable[[], object]) -> set[tuple[str, str]]:
    """File and qualified name of every function of the library that a call enters."""
    found = set()

    def note(frame, event, argument):
        del argument
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            name = code.co_qualname
            if not name.endswith((">",)):
                found.add((code.co_filename, name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def trip(name: str) -> tuple[int, int]:
    """Numbers of files and of functions that a pruning by one method enters."""
    model = flj.Model(lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"], flj.likelihoods.categorical())
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "one": jax.random.normal(keys[0], (5, 4)),
        "two": jax.random.normal(keys[1], (4, 3)),
    }
    inputs = jax.random.normal(keys[2], (32, 5))
    batch = inputs, jax.random.randint(keys[3], (32,), 0, 3)
    estimator = METHODS[name](model)
    prune = flj.prune_one_shot  # imports its module, which is not part of the trip
    found = entered(lambda: prune(model, params, estimator, [batch], sparsity=0.5))
    return len({file for file, _ in found}), len(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the count.

    Args:
        argv: Arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.trip", description=__doc__.split("\n")[0]
    )
    parser.parse_args(argv)
    rows = [[name, *map(str, trip(name))] for name in METHODS]
    print(tables.table(["method", "files", "functions"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
