"""Times fits from per-example gradients for networks with grouped and ungrouped convolutions.

    python -m experiments.benchmarks.per_example
    python -m experiments.benchmarks.per_example --plain --examples 64

A depthwise-separable network of 1,760 weights, and the same with two or four groups, beside an
ungrouped network with as many operations for each.  With `--plain` the convolutions are left to
XLA, as they were before the library replaced slow ones.  Networks alternate; the shortest of
several runs counts, and the time to compile stands beside it.
"""

import argparse
import contextlib
import functools
import sys
import time
import unittest.mock
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.benchmarks.timing import seconds
from experiments.estimates.methods import variant
from experiments.report import tables
from experiments.running import arguments
from fishleg_jax import _convolutions

ESTIMATORS = {
    "kfac": variant("kfac"),
    "diagonal": variant("diagonal"),
    "woodfisher": variant("woodfisher", gradients=64, block_size=16),
    "fishleg": variant("fishleg", start=2, cap=32),
}
CHANNELS = {"depthwise": (16, 16), "4 groups": (16, 4), "2 groups": (16, 2)}
CLASSES = 8


def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    """A convolution with zeros around the image, channels last."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def predict(groups: int, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Three layers of a 3x3 convolution in groups and a pointwise one, then a mean and a readout.

    Args:
        groups: of the 3x3 convolutions.
        params: weights.
        x: images.

    Returns:
        Logits.
    """
    x = jax.nn.relu(convolve(x, params["first"]))
    for layer in range(3):
        x = jax.nn.relu(convolve(x, params[f"spatial{layer}"], groups))
        x = jax.nn.relu(convolve(x, params[f"pointwise{layer}"]))
    return x.mean((1, 2)) @ params["readout"]


def make(channels: int, groups: int) -> tuple[flj.Model, dict[str, jax.Array]]:
    """A network and its random weights.

    Args:
        channels: of every layer.
        groups: of its 3x3 convolutions.

    Returns:
        The model and its weights.
    """
    shapes = {"first": (3, 3, 3, channels), "readout": (channels, CLASSES)}
    for layer in range(3):
        shapes[f"spatial{layer}"] = 3, 3, channels // groups, channels
        shapes[f"pointwise{layer}"] = 1, 1, channels, channels
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape) / max(1, shape[-2]) ** 0.5 / 2
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return flj.Model(functools.partial(predict, groups), flj.likelihoods.categorical()), params


def multiplications(params: dict[str, jax.Array]) -> int:
    """Multiplications at every position of an image: one for every weight but the readout."""
    return sum(w.size for name, w in params.items() if name != "readout")


def alike(count: int) -> int:
    """The channels of the ungrouped network whose operations are nearest to a number."""
    return min(range(1, 65), key=lambda c: abs(27 * c + 30 * c * c - count))


@contextlib.contextmanager
def left_to_xla(plain: bool) -> Iterator[None]:
    """Replaces no convolution, for as long as it lasts, if `plain`."""
    if not plain:
        yield
        return
    with unittest.mock.patch.object(_convolutions, "replacement", lambda equation, in_loop: None):
        yield


def measure(
    name: str, network: str, *, examples: int, size: int, chunk: int | None, repeats: int
) -> dict:
    """Times an update of an estimator for a grouped network and for an ungrouped one.

    Args:
        name: an estimator, or `gradient` for that of the batch's loss, by JAX alone.
        network: which groups.
        examples: in the batch.
        size: of the images, in pixels along an axis.
        chunk: examples worked on at once; None for all.
        repeats: how often each is timed.

    Returns:
        Seconds of both, their ratio and seconds to compile.
    """
    channels, groups = CHANNELS[network]
    grouped = make(channels, groups)
    images = jax.random.normal(jax.random.key(1), (examples, size, size, 3))
    batch = images, jnp.arange(examples) % CLASSES
    key = jax.random.key(2)
    calls, compiles = [], []
    for model, params in (grouped, make(alike(multiplications(grouped[1])), 1)):
        if name == "gradient":
            function, given = jax.grad(functools.partial(flj.loss, model)), (params, batch)
        else:
            estimator = ESTIMATORS[name](model, examples_per_chunk=chunk)
            function, given = estimator.update, (estimator.init(params), params, batch, key)
        begin = time.perf_counter()
        calls.append(functools.partial(jax.jit(function).lower(*given).compile(), *given))
        compiles.append(time.perf_counter() - begin)
        seconds(calls[-1])
    times = [[seconds(call) for call in calls] for _ in range(repeats)]
    shortest = [min(column) for column in zip(*times, strict=True)]
    return {
        "network": network,
        "weights": sum(w.size for w in grouped[1].values()),
        "estimate": name,
        "grouped": shortest[0],
        "ungrouped": shortest[1],
        "ratio": shortest[0] / shortest[1],
        "compile": compiles[0],
    }


def show(rows: Sequence[dict]) -> str:
    """The measurements as a table."""
    header = ["network", "weights", "estimate", "grouped, s", "ungrouped, s", "ratio", "compile, s"]
    cells = [
        [
            row["network"],
            str(row["weights"]),
            row["estimate"],
            f"{row['grouped']:.3f}",
            f"{row['ungrouped']:.3f}",
            f"{row['ratio']:.1f}",
            f"{row['compile']:.1f}",
        ]
        for row in rows
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
        "python -m experiments.benchmarks.per_example", description="Time fits of grouped networks."
    )
    names = (*ESTIMATORS, "gradient")
    add = parser.add_argument
    add("--networks", type=arguments.comma_list(arguments.one_of(CHANNELS)), default=[*CHANNELS],
        help="names with commas between; default: all")  # fmt: skip
    add("--estimates", type=arguments.comma_list(arguments.one_of(names)), default=[*names],
        help="names with commas between; default: all")  # fmt: skip
    add("--examples", type=arguments.at_least(1), default=256, help="default: 256")
    add("--size", type=arguments.at_least(2), default=16, help="pixels of a side; default: 16")
    add("--chunk", type=arguments.at_least(1), help="examples worked on at once; default: all")
    add("--repeats", type=arguments.at_least(1), default=5, help="default: 5")
    add("--plain", action="store_true", help="leave convolutions to XLA")
    args = parser.parse_args(argv)
    how = {"examples": args.examples, "size": args.size}
    with left_to_xla(args.plain):
        rows = [
            measure(name, network, chunk=args.chunk, repeats=args.repeats, **how)
            for network in args.networks
            for name in args.estimates
        ]
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
