"""Times `import fishleg_jax` against the import of its dependencies, in fresh processes.

    python -m experiments.benchmarks.imports [--repeats 12]

Three statements alternate: `import jax, optax`; `import fishleg_jax`, which imports these two and
its own rooms on first use; and `from fishleg_jax import *`, which imports all of them.  Printed are
medians and their ratio to the first.  Where Python may not write bytecode
(`PYTHONDONTWRITEBYTECODE`), it compiles every file of a checkout in each process; `--bytecode` lets
it write, into a temporary folder, as in an installation.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

STATEMENTS = ("import jax, optax", "import fishleg_jax", "from fishleg_jax import *")


def times(statement: str, environment: dict[str, str]) -> tuple[float, float]:
    """Wall-clock and CPU time of a fresh process that runs a statement, in milliseconds."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], env=environment, check=True)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return 1e3 * wall, 1e3 * cpu


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement.

    Args:
        argv: Arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.imports", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=12, help="processes for each statement")
    parser.add_argument("--bytecode", action="store_true", help="let Python cache bytecode")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if options.bytecode:
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            environment["PYTHONPYCACHEPREFIX"] = folder
        runs: dict[str, list] = {statement: [] for statement in STATEMENTS}
        times(STATEMENTS[-1], environment)  # fills the caches
        for _ in range(options.repeats):
            for statement, own in runs.items():
                own.append(times(statement, environment))
    medians = {s: [statistics.median(x) for x in zip(*own, strict=True)] for s, own in runs.items()}
    base = medians[STATEMENTS[0]]
    print(f"{'milliseconds':28} {'wall':>6} ratio {'cpu':>6} ratio")
    for statement, (wall, cpu) in medians.items():
        print(f"{statement:28} {wall:6.0f} {wall / base[0]:5.2f} {cpu:6.0f} {cpu / base[1]:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
