"""Kills one of several processes of `experiments.gradual`, and lets the run go on.

    python -m experiments.killing_process
    python -m experiments.killing_process --processes 2,4 --victim 0

Processes on this machine share a run.  One run is left alone; of another a process is sent
SIGKILL once there is a checkpoint.  The others have to end with an error within a minute, and the
same commands again have to end with the weights and masks of the first run, bit for bit.  A run in
one process shows how far several differ from it.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.killing import finished, identical
from experiments.report import record
from experiments.running import arguments

RUN = (
    "--model",
    "mlp",
    "--epochs",
    "0",
    "--seed",
    "0",
    "--sparsity",
    "0.9",
    "--dense",
    "start",
    "--mask-every",
    "20",
    "--method",
    "fishleg",
    "--checkpoint-every",
    "0.5",
)
TELLING = ("another process has died", "distributed service", "heartbeat", "Gloo")
COLUMNS = {
    "processes": "{processes}",
    "masks that differ from one process": "{masks}",
    "weights differ by at most": "{weights:.1e}",
    "killed: all others ended after, s": "{ended:.1f}",
    "started again": "{again}",
}
MOST = 60  # seconds until all others have to have ended


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return f"localhost:{one.getsockname()[1]}"


def memberships(processes: int) -> list[list[str]]:
    """Arguments with which processes of this machine share a run; none for a single process.

    Args:
        processes: number of processes.
    """
    if processes == 1:
        return [[]]
    shared = ["--coordinator", free_address(), "--processes", str(processes)]
    return [[*shared, "--process-id", str(i)] for i in range(processes)]


def start(module: str, options: Sequence[str], processes: int) -> list[subprocess.Popen]:
    """Starts an experiment in several processes of one device each.

    Args:
        module: of `experiments`.
        options: its arguments.
        processes: number of processes; 1 for a plain run.
    """
    command = [sys.executable, "-m", f"experiments.{module}", *options]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return [
        subprocess.Popen(
            [*command, *more],
            env=os.environ | flags,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for more in memberships(processes)
    ]


def complete(module: str, options: Sequence[str], processes: int) -> None:
    """Runs an experiment to its end.

    Raises:
        RuntimeError: a process failed.
    """
    running = start(module, options, processes)
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(process.args)} failed:\n{error}")


def kill_one(out: Path, options: Sequence[str], processes: int, victim: int) -> list[float]:
    """Kills a process once there is a checkpoint, and waits for the others.

    Returns:
        Seconds until each of the others ended.

    Raises:
        RuntimeError: one of them ended as if nothing had happened, or did not end.
    """
    running = start("gradual", options, processes)
    try:
        while not any(path.name.isdigit() for path in out.glob("runs/*/checkpoints/*")):
            if any(process.poll() is not None for process in running):
                raise RuntimeError(f"ended before the kill:\n{running[0].communicate()[1]}")
            time.sleep(0.05)
        running[victim].kill()
        begin = time.perf_counter()
        seconds = []
        for i, process in enumerate(running):
            if i == victim:
                continue
            error = process.communicate(timeout=MOST)[1]
            seconds.append(time.perf_counter() - begin)
            if process.returncode == 0:
                raise RuntimeError(f"process {i} ended well after process {victim} was killed")
            print(
                f"process {i} ended after {seconds[-1]:.1f} s with exit code "
                f"{process.returncode}: {reason(error)}",
                flush=True,
            )
        return seconds
    finally:
        for process in running:
            process.kill()
            process.wait()


def reason(error: str) -> str:
    """The reason for its end that a process printed: JAX's words precede the stack of an abort."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in TELLING)]
    return (telling or lines or ["nothing"])[-1][:300]


def furthest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> tuple[float, int]:
    """The largest difference of weights of two runs, and the number of masks that differ."""
    if one.keys() != other.keys():
        raise RuntimeError(f"other files: {sorted(one.keys() ^ other.keys())}")
    masks = [name for name in one if "/masks.npz/" in name and name.endswith(":bits")]
    weights = max(
        float(np.abs(one[name] - other[name]).max()) for name in one if "/weights.npz/" in name
    )
    return weights, sum(int(np.unpackbits(one[name] ^ other[name]).sum()) for name in masks)


def run(processes: int, victim: int, options: Sequence[str], out: Path) -> dict[str, Any]:
    """Runs one process, then several, then several again with one of them killed.

    Args:
        processes: number of processes.
        victim: the one that is killed.
        options: arguments of `experiments.gradual`, and for several processes.
        out: folder for the runs.

    Returns:
        The numbers of `COLUMNS`, and `same`: whether the killed run ended with the same weights.
    """
    alone, shared = [*options[0], "--out"], [*options[0], *options[1], "--out"]
    complete("gradual", [*alone, str(out / "single")], 1)
    complete("gradual", [*shared, str(out / "unbroken")], processes)
    expected = finished(out / "unbroken")
    weights, masks = furthest(finished(out / "single"), expected)
    ends = kill_one(out / "killed", [*shared, str(out / "killed")], processes, victim)
    complete("gradual", [*shared, str(out / "killed")], processes)
    same = identical(finished(out / "killed"), expected)
    return {
        "processes": processes,
        "masks": masks,
        "weights": weights,
        "ended": max(ends),
        "same": same,
        "again": "the same, bit for bit" if same else "OTHER weights or masks",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code: 1 where a run ended with other weights.
    """
    parser = arguments.command(
        "experiments.killing_process", "Kill one of several processes, and let the run go on."
    )
    option = partial(arguments.option, parser)
    option("--processes", arguments.at_least(2), [2], several=True)
    option("--victim", arguments.at_least(0), 1, "the process to kill")
    option("--steps", arguments.at_least(100), 400)
    option("--heartbeat", arguments.at_least(1), 20, "seconds")
    option("--out", Path, Path("results/killing_process"))
    record.add_option(parser)
    args = parser.parse_args(argv)
    if args.victim >= min(args.processes):
        parser.error(f"--victim must be less than --processes, got {args.victim}")
    shutil.rmtree(args.out, ignore_errors=True)
    options = [*RUN, "--steps", str(args.steps)], ["--heartbeat", str(args.heartbeat)]
    rows = [run(n, args.victim, options, args.out / str(n)) for n in args.processes]
    made = record.of_rows(
        "Several processes against one, and one of them killed",
        rows,
        COLUMNS,
        seed="0",
        data="digits; the fully connected net, gradually pruned to 90 % by FishLeg, float32",
        examples=f"{args.steps} steps",
        note=f"Process {args.victim} was killed once there was a checkpoint; seconds until the "
        "last of the others ended with an error.",
    )
    print(made)
    record.keep(args.record, made, "experiments.killing_process", argv)
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
