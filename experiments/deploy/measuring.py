"""Accuracies, bytes and milliseconds of all paths, measured in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.deploy.paths import BASE, PATHS, Deployed, Run
from experiments.deploy.subjects import Subject

Call = Callable[[Any], Any]
BATCHES = (1, 128)
SHORTEST = 0.001  # seconds of one measurement; shorter calls are repeated
FEWEST = 5  # rounds


def measure(subject: Subject, seconds: float, out: Path) -> list[dict[str, Any]]:
    """Measures every path of one network.

    Args:
        subject: the network.
        seconds: of the timing, for each batch size.
        out: folder of the files.

    Returns:
        An object for each path: accuracy in percent, bytes on disk, and for each batch size the
        median milliseconds, and the median over rounds of their ratio to the dense network's.
    """
    rows = {name: {"network": subject.name, "path": name} for name in PATHS}
    for batch in BATCHES:
        ready = {name: _make(name, subject, out, batch) for name in PATHS}
        inputs = subject.test[0][np.arange(batch) % len(subject.test[0])]
        found = in_turn({name: deployed.run for name, deployed in ready.items()}, inputs, seconds)
        for name, times in found.items():
            ratios = [own / base for own, base in zip(times, found[BASE], strict=True)]
            rows[name] |= {
                f"ms_{batch}": 1e3 * statistics.median(times),
                f"ratio_{batch}": statistics.median(ratios),
                f"note_{batch}": ready[name].note,
            }
    # of the larger batch, whose file and function are those measured last
    for name, deployed in ready.items():
        file = deployed.file
        rows[name]["accuracy"] = accuracy(deployed.run, subject, BATCHES[-1])
        rows[name]["bytes"] = file.stat().st_size if file else None
    for row in rows.values():
        row["bytes_ratio"] = row["bytes"] and row["bytes"] / rows[BASE]["bytes"]
    return list(rows.values())


def _make(name: str, subject: Subject, out: Path, batch: int) -> Deployed:
    stem = out / f"{subject.name}_{PATHS[name].__name__}"
    return PATHS[name](subject, stem, batch)


def in_turn(runs: Mapping[str, Call], inputs: Any, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call of each function, in rounds that go through all of them.

    Every round has an order of its own, and every measurement a call before it: what ran before
    leaves its data in the caches, and threads that still wait for work.

    Args:
        runs: functions by name, which return when their outputs are there.
        inputs: their argument.
        seconds: begins no further round after so long, but for the first five.

    Returns:
        For each name as many numbers as there are rounds.
    """
    calls = {}
    for name, run in runs.items():
        run(inputs)  # compiles
        calls[name] = max(1, round(SHORTEST / min(_seconds(run, inputs, 1) for _ in range(3))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, names = np.random.default_rng(0), list(runs)
    end = time.perf_counter() + seconds
    while len(times[BASE]) < FEWEST or time.perf_counter() < end:
        for i in order.permutation(len(names)):
            name = names[i]
            runs[name](inputs)
            times[name].append(_seconds(runs[name], inputs, calls[name]))
    return times


def _seconds(run: Call, inputs: Any, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run(inputs)
    return (time.perf_counter() - begin) / calls


def accuracy(run: Run, subject: Subject, batch: int) -> float:
    """Accuracy on the test examples, in percent, in batches of one size."""
    inputs, labels = subject.test
    correct = 0
    for begin in range(0, len(inputs), batch):
        rows = np.arange(begin, begin + batch)
        outputs = run(inputs[np.minimum(rows, len(inputs) - 1)])
        size = min(batch, len(inputs) - begin)
        correct += int((outputs[:size].argmax(axis=-1) == labels[begin : begin + size]).sum())
    return 100 * correct / len(inputs)
