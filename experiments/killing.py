"""Kills runs of `experiments.gradual` at random moments, and compares their final weights.

    python -m experiments.killing
    python -m experiments.killing --kills 2 -- --method magnitude

One run is left alone.  As many others as there are kills are each sent SIGKILL once, at a random
moment between the beginning of their training and the end of that of the first one, started again
by the same command, and have to end with the very same weights and masks, bit for bit.  What stands
behind `--` goes to `experiments.gradual`.
"""

import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.running import arguments

# small, with many checkpoints: killing it is the point
RUN = (
    "--model",
    "mlp",
    "--epochs",
    "2",
    "--seed",
    "0",
    "--sparsity",
    "0.9",
    "--dense",
    "start",
    "--steps",
    "3000",
    "--mask-every",
    "100",
    "--method",
    "fishleg",
    "--checkpoint-every",
    "0.2",
)


def command(out: Path, options: Sequence[str] = ()) -> list[str]:
    """The command of a run, with `options` after its own."""
    return [sys.executable, "-m", "experiments.gradual", *RUN, *options, "--out", str(out)]


def finished(out: Path) -> dict[str, np.ndarray]:
    """The weights and masks that the runs of a folder have ended with, by file and name."""
    arrays = {}
    for path in sorted((out / "runs").glob("*/*.npz")):
        with np.load(path) as entries:
            for name in entries.files:
                arrays[f"{path.parent.name}/{path.name}/{name}"] = entries[name]
    return arrays


def identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two runs have ended with the same bits, and with any."""
    same = one.keys() == other.keys() and len(one) > 0
    return same and all(
        x.dtype == other[name].dtype and x.tobytes() == other[name].tobytes()
        for name, x in one.items()
    )


def run(out: Path, options: Sequence[str] = (), kill_after: float | None = None) -> float | None:
    """Runs it, and kills it where it takes longer than it may.

    Args:
        out: its folder.
        options: further options of `experiments.gradual`.
        kill_after: seconds from the beginning of its training until SIGKILL; None for never.

    Returns:
        The seconds from the beginning of its training to its result; None where it was killed.

    Raises:
        RuntimeError: it failed by itself.
    """
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # half the time to compile
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command(out, options), stdout=subprocess.DEVNULL, stderr=errors, env=environment
        ) as process,
    ):

        def seconds_until(there: Callable[[], bool], most: float = math.inf) -> float:
            begin = time.perf_counter()
            while process.poll() is None and not there() and time.perf_counter() - begin < most:
                time.sleep(0.005)
            return time.perf_counter() - begin

        seconds_until(lambda: any(out.glob("runs/*/checkpoints")))
        most = math.inf if kill_after is None else kill_after
        seconds = seconds_until((out / "results.json").exists, most)
        if process.poll() is None and seconds >= most:
            process.kill()  # SIGKILL, which no process can do anything about
            return None
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"{' '.join(process.args)} failed:\n{errors.read().decode()}")
        return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code: 1 where a run ended with other weights.
    """
    parser = arguments.command("experiments.killing", "Kill runs, and compare their weights.")
    option = partial(arguments.option, parser)
    option("--kills", arguments.at_least(1), 20)
    option("--seed", arguments.seed, 0, "of the moments")
    option("--out", Path, Path("results/killing"))
    parser.add_argument("options", nargs="*", help="behind --, for experiments.gradual")
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    seconds = run(args.out / "unbroken", args.options)
    expected = finished(args.out / "unbroken")
    moments = random.Random(args.seed)
    different = 0
    for i in tqdm(range(args.kills), desc="kills", disable=None):
        out, moment = args.out / str(i), moments.uniform(0, seconds)
        # one may be faster than the first: then earlier, until one is killed
        while run(out, args.options, kill_after=moment) is not None:
            shutil.rmtree(out)
            moment /= 2
        at = [path.name for path in sorted(out.glob("runs/*/checkpoints/*"))]
        run(out, args.options)
        same = identical(finished(out), expected)
        different += not same
        told = f"{i + 1}: killed after {moment:.2f} s, checkpoints {', '.join(at) or 'none'}"
        print(f"{told}: {'identical' if same else 'DIFFERENT'}", flush=True)
        if same:
            shutil.rmtree(out)
    print(
        f"{args.kills} runs were killed, the unbroken one trained for {seconds:.1f} s; "
        f"{len(expected)} arrays, {args.kills - different} of {args.kills} runs identical"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
