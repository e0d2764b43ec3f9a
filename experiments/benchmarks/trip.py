"""Counts the files and functions of the library that one `prune_one_shot` enters.

    python -m experiments.benchmarks.trip [--rooms]

Two arrays are pruned by half with each estimate, with `sys.setprofile` noting every function of
`fishleg_jax` that Python enters, tracing included.  `<lambda>` and comprehensions do not count as
functions of their own, and bodies of modules and classes, which run once when a module is imported,
do not count at all.  Compilations of the method before are forgotten.  `--rooms` also counts the
functions that refuse bad input, and those in each room.
"""

import argparse
import collections
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.estimates import methods
from experiments.report import tables

ROOT = Path(flj.__file__).parent
NAMES = ("magnitude", "diagonal", "kfac", "fishleg")


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


def room(file: str, name: str) -> str:
    """The room of a function of the library; `refusals` for those that raise for bad input."""
    inside = Path(file).relative_to(ROOT)
    refuses = re.match("_?(check|require|warn|is|have)_", name.split(".")[-1])
    if refuses or "check" in inside.stem or inside.parts[0] == "_checks":
        return "refusals"
    return "/".join(inside.parts[:-1]) or "the root"


def trip(name: str) -> set[tuple[str, str]]:
    """Files and functions that a pruning by one method enters."""
    model = flj.Model(lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"], flj.likelihoods.categorical())
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "one": jax.random.normal(keys[0], (5, 4)),
        "two": jax.random.normal(keys[1], (4, 3)),
    }
    inputs = jax.random.normal(keys[2], (32, 5))
    batch = inputs, jax.random.randint(keys[3], (32,), 0, 3)
    estimator = methods.variant(name)(model)
    prune = flj.prune_one_shot  # looking it up is not part of the trip
    jax.clear_caches()
    return entered(lambda: prune(model, params, estimator, [batch], sparsity=0.5))


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
    parser.add_argument("--rooms", action="store_true", help="count room by room, too")
    args = parser.parse_args(argv)
    # Import all modules, so that no import is part of a trip.
    for module in pkgutil.walk_packages(flj.__path__, f"{flj.__name__}."):
        importlib.import_module(module.name)
    found = {name: trip(name) for name in NAMES}
    rows = [[k, str(len({file for file, _ in x})), str(len(x))] for k, x in found.items()]
    print(tables.table(["method", "files", "functions"], rows))
    if args.rooms:
        counts = {k: collections.Counter(room(*one) for one in x) for k, x in found.items()}
        rooms = sorted(set().union(*counts.values()))
        rows = [[name, *(str(counts[k][name]) for k in NAMES)] for name in rooms]
        print("", tables.table(["functions in", *NAMES], rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
