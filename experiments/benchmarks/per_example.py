"""Times fits from per-example gradients for networks with grouped and ungrouped convolutions.

    python -m experiments.benchmarks.per_example
    python -m experiments.benchmarks.per_example --plain --examples 64

A depthwise-separable network of 1,760 weights, and the same with two or four groups, beside an
ungrouped network with as many operations for each.  With `--plain` the convolutions are left to
XLA, as they were before the library replaced slow ones.  Networks alternate; the shortest of
several runs counts, and the time to compile stands beside it.
"""

import contextlib
import sys
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.benchmarks.timing import seconds
from experiments.estimates.methods import variant
from experiments.report import record
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
COLUMNS = {
    "network": "{network}",
    "weights": "{weights}",
    "estimate": "{estimate}",
    "grouped, s": "{grouped:.3f}",
    "ungrouped, s": "{ungrouped:.3f}",
    "ratio": "{ratio:.1f}",
    "compile, s": "{compile:.1f}",
}


def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    """A convolution with zeros around the image, channels last."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


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
    return flj.Model(partial(predict, groups), flj.likelihoods.categorical()), params


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
        repeats: number of timed calls of each.

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
            function, given = jax.grad(partial(flj.loss, model)), (params, batch)
        else:
            estimator = ESTIMATORS[name](model, examples_per_chunk=chunk)
            function, given = estimator.update, (estimator.init(params), params, batch, key)
        begin = time.perf_counter()
        calls.append(partial(jax.jit(function).lower(*given).compile(), *given))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command(
        "experiments.benchmarks.per_example", "Time fits of grouped networks."
    )
    option = partial(arguments.option, parser)
    names = (*ESTIMATORS, "gradient")
    option("--networks", arguments.one_of(CHANNELS), list(CHANNELS), several=True)
    option("--estimates", arguments.one_of(names), list(names), several=True)
    option("--examples", arguments.at_least(1), 256)
    option("--size", arguments.at_least(2), 16, "pixels of a side")
    option("--repeats", arguments.at_least(1), 5)
    add = parser.add_argument
    add("--chunk", type=arguments.at_least(1), help="examples worked on at once; default: all")
    add("--plain", action="store_true", help="leave convolutions to XLA")
    record.add_option(parser)
    args = parser.parse_args(argv)
    how = {"examples": args.examples, "size": args.size}
    with left_to_xla(args.plain):
        rows = [
            measure(name, network, chunk=args.chunk, repeats=args.repeats, **how)
            for network in args.networks
            for name in args.estimates
        ]
    made = record.of_rows(
        "Updates for networks with grouped and ungrouped convolutions",
        rows,
        COLUMNS,
        seed="0",
        data=f"small convolutional networks on random images, {args.size} pixels a side",
        examples=f"{args.examples} images",
        note=f"Seconds of a compiled update, the fastest of {args.repeats}; the ratio is over an "
        "ungrouped network of as many operations. `gradient` is XLA's own of a whole batch, which "
        "the library does not touch.",
    )
    print(made)
    record.keep(args.record, made, "experiments.benchmarks.per_example", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
