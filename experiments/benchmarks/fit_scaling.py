"""Time and memory of a FishLeg fit against the number of weights, by width and by depth.

    python -m experiments.benchmarks.fit_scaling
    python -m experiments.benchmarks.fit_scaling --weights 1e6,1e7 --cap 128

Networks have square layers n×n without biases, random weights, random inputs.  `width` has 4 layers
and a growing n, `depth` a growing number of layers of 512×512 (128×128 below a million weights); a
layer takes seconds to compile, so that 10⁸ weights want `--depth-units 1024`.  Measured are the
update while FishLeg starts, the one that makes its frames, and the learning update, which is most
of a fit: after they are compiled, medians of `--repeats`.  Beside its seconds stand those of the
processor, which others on it do not stretch.  Bytes are those of the state, those that
`fishleg_jax.peak_memory` predicts for state and update, and the most that were taken.  Every case
has a process of its own.

What is fitted is a line through the logarithms: the slope against d of seconds and of bytes from a
million weights on, below which what every operation costs by itself is most of the time.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.benchmarks.timing import seconds
from experiments.report import plots, tables
from experiments.running import arguments, files, memory
from experiments.running.arguments import at_least, comma_list, one_of, positive
from fishleg_jax._jit import jitted

FAMILIES = ("width", "depth")
LAYERS = 4  # of the family of widths
DEPTH_UNITS = 512  # of the family of depths, from `LARGE` weights on
WIDTHS = 64  # divides every width, or the blocks of some would be padded
WEIGHTS = (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)
START = 4  # updates, so that few have to be made to get past it
LARGE = 10**6  # weights from which slopes count
TIMES = ("starting_s", "framing_s", "learning_s", "learning_cpu_s")
SIZES = ("state_bytes", "predicted_bytes", "peak_bytes")
COLUMNS = {
    "family": "{family}",
    "cap": "{cap}",
    "weights": "{weights:.2e}",
    "layers": "{layers}",
    "units": "{units}",
    "compile, s": "{compile_s:.0f}",
    "start, ms": "{starting_s:.1f}",
    "frames, ms": "{framing_s:.1f}",
    "learning, ms": "{learning_s:.1f}",
    "processor, ms": "{learning_cpu_s:.1f}",
    "state, MB": "{state_bytes:.1f}",
    "predicted, MB": "{predicted_bytes:.1f}",
    "peak, MB": "{peak_bytes:.1f}",
}
SLOPES = {
    "slope against d": "{family}",
    "cap": "{cap}",
    "points": "{points}",
    "learning": "{learning_s:.2f}",
    "processor": "{learning_cpu_s:.2f}",
    "start": "{starting_s:.2f}",
    "peak": "{peak_bytes:.2f}",
    "predicted": "{predicted_bytes:.2f}",
}
QUANTITIES = ("learning_s", "learning_cpu_s", "starting_s", "peak_bytes", "predicted_bytes")


def sizes(family: str, weights: float, depth_units: int = DEPTH_UNITS) -> tuple[int, int]:
    """Number of layers, and of units in each, of a network of about `weights` weights."""
    if family == "width":
        return LAYERS, WIDTHS * round(math.sqrt(weights / LAYERS) / WIDTHS)
    units = depth_units if weights >= LARGE else 128
    return max(round(weights / units**2), 1), units


def predict(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """A network of square layers."""
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x


def measure(layers: int, units: int, cap: int | None, batch: int, repeats: int) -> dict:
    """Times updates of one network, and watches the memory.

    Args:
        layers: number of layers.
        units: in each of them.
        cap: of the factors.
        batch: number of examples.
        repeats: number of timed updates of each kind.
    """
    model = flj.Model(predict, flj.likelihoods.gaussian())
    estimator = flj.inverse.fishleg(model, cap=cap, learn=True, start=START)
    keys = jax.random.split(jax.random.key(0), layers)
    params = [jax.random.normal(k, (units, units)) / math.sqrt(units) for k in keys]
    data = jax.random.normal(jax.random.key(1), (batch, units)), None
    begin = time.perf_counter()
    predicted = flj.peak_memory(estimator, params, data)
    compiled = time.perf_counter() - begin
    initialise, update = jitted(estimator.init), jitted(estimator.update, donate=0)
    jax.block_until_ready((params, initialise.lower(params).compile()))
    times, used = [], []
    with memory.watch() as peak:
        state = initialise(params)
        for i in range(START + 1 + repeats):

            def step(i=i):
                nonlocal state
                state = update(state, params, data, jax.random.fold_in(keys[0], i), None)
                return state

            used.append(-time.process_time())
            times.append(seconds(step))
            used[-1] += time.process_time()
        highest = peak()
    # the frames are made of the first half of the start
    framing = START // 2 - 1
    return {
        "weights": layers * units**2,
        "layers": layers,
        "units": units,
        "compile_s": compiled,
        "starting_s": statistics.median(times[START // 2 : START]),
        "framing_s": times[framing],
        "learning_s": statistics.median(times[START + 1 :]),
        "learning_cpu_s": statistics.median(used[START + 1 :]),
        "state_bytes": predicted.state,
        "predicted_bytes": predicted.peak,
        "peak_bytes": highest,
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares through the logarithms of points (x, y)."""
    if len(points) < 2:
        return math.nan
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return statistics.linear_regression(xs, ys).slope


def slopes(rows: Sequence[dict]) -> list[dict]:
    """The slopes against d of every family and cap."""
    found = []
    for family, cap in dict.fromkeys((row["family"], row["cap"]) for row in rows):
        own = [row for row in rows if (row["family"], row["cap"]) == (family, cap)]
        own = [row for row in own if row["weights"] > 0.9 * LARGE]
        fitted = {
            name: slope([(row["weights"], row[name]) for row in own if row.get(name)])
            for name in QUANTITIES
        }
        found.append({"family": family, "cap": cap, "points": len(own), **fitted})
    return found


def reason(layers: int, units: int, cap: int | None, args) -> str | None:
    """Why a case is left out; None where it is not."""
    if cap is None and units > args.uncapped_units:
        return (
            f"whole factors of {units}×{units}: eigenvectors of {2 * layers} such matrices and "
            f"products of {units}³ operations, see --uncapped-units"
        )
    return None


def run(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """All cases, each in a fresh process, and the reasons for those left out."""
    rows, left_out = [], []
    for cap in args.cap:
        for family in args.family:
            for weights in args.weights:
                layers, units = sizes(family, weights, args.depth_units)
                why = reason(layers, units, cap, args)
                if why:
                    left_out.append(f"{family}, cap {_cap(cap)}, {weights:.0e} weights: {why}")
                    continue
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    job = process.submit(measure, layers, units, cap, args.batch, args.repeats)
                    rows.append({"family": family, "cap": cap, **job.result()})
                print(show(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                files.write_json(args.out / "fit_scaling.json", rows)
    return rows, left_out


def _cap(cap: int | None) -> str:
    return "none" if cap is None else str(cap)


def show(rows: Sequence[dict]) -> str:
    """The measurements as a table: times in milliseconds, bytes in megabytes."""
    return tables.of_rows([_shown(row) for row in rows], COLUMNS)


def _shown(row: dict) -> dict:
    times = {name: 1000 * row[name] for name in row if name in TIMES}
    sizes = {name: row[name] / 1e6 for name in row if name in SIZES and row[name] is not None}
    return row | times | sizes | {"cap": _cap(row["cap"])}


def show_slopes(found: Sequence[dict]) -> str:
    """The slopes as a table."""
    return tables.of_rows([row | {"cap": _cap(row["cap"])} for row in found], SLOPES)


def _cap_of(text: str) -> int | None:
    return None if text == "none" else at_least(1)(text)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all arguments."""
    parser = arguments.command(
        "experiments.benchmarks.fit_scaling",
        "Time and memory of a FishLeg fit against the number of weights.",
    )
    add, option, count = parser.add_argument, partial(arguments.option, parser), at_least(1)
    option("--family", one_of(FAMILIES), FAMILIES, several=True)
    caps = comma_list(_cap_of)
    add("--cap", type=caps, default=[128, None], metavar="A,B", help="default: 128,none")
    option("--weights", positive, WEIGHTS, several=True)
    option("--uncapped-units", count, 1600, "the widest layers that are tried without a cap")
    option("--depth-units", count, DEPTH_UNITS, "in layers of depth, from a million weights on")
    option("--batch", count, 32, "examples")
    option("--repeats", count, 5)
    option("--out", Path, Path("results/fit_scaling"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    args = make_parser().parse_args(argv)
    rows, left_out = run(args)
    print(show(rows), "", show_slopes(slopes(rows)), sep="\n")
    for line in left_out:
        print(f"left out: {line}")
    print(files.write_json(args.out / "fit_scaling.json", rows))
    print(plots.against_weights(args.out / "fit_scaling.png", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
