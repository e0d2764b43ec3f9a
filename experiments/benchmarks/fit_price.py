"""Times a one-shot fit of FishLeg against one of K-FAC, in turn, on the same examples.

    python -m experiments.benchmarks.fit_price
    python -m experiments.benchmarks.fit_price --case transformer --examples 512 --repeats 3

Both fits are those of the defaults, one pass.  The first fit of each compiles and stands apart; of
the others the shortest counts, in seconds of the processor, which other programs do not stretch,
beside those of the clock.  Weights are those of the shared folder, and random ones where it has
none.  How good the inverse is stands beside: the auxiliary loss on as many held-out examples, times
γ/d, at the mean of the Fisher's diagonal as damping (−½ at F = 0, higher for a worse inverse), by
exact Fisher products with `--probes` random signs.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.estimates.methods import variant
from experiments.models import cases
from experiments.models.specs import MODELS
from experiments.report import tables
from experiments.running import arguments, network_arguments

CASES = ("resnet20", "autoencoder", "transformer")
BATCHES = {"resnet20": 125, "autoencoder": 100, "transformer": 64}
ESTIMATES = {name: variant(name) for name in ("kfac", "fishleg")}
COLUMNS = {
    "case": "{case}",
    "estimate": "{estimate}",
    "examples": "{examples}",
    "first fit, s": "{first:.1f}",
    "fit, processor s": "{cpu:.2f}",
    "of K-FAC's": "{ratio:.2f}",
    "fit, clock s": "{clock:.2f}",
    "held-out loss": "{loss:.4f}",
}


def measure(
    name: str, *, examples: int, repeats: int, probes: int, seed: int, data_dir: Any
) -> list[dict]:
    """Times the fits of one network.

    Args:
        name: a name in `MODELS`.
        examples: training examples of a fit.
        repeats: number of timed fits of each estimate, after the first.
        probes: number of random vectors of the held-out loss; 0 leaves it out.
        seed: of the examples and labels.
        data_dir: see `experiments.data.datasets.prepared`.

    Returns:
        One row for each estimate.
    """
    spec = MODELS[name]
    params, constants, train = cases.network(name, train_in=None, data_dir=data_dir)
    cut = {"examples": examples, "batch_size": BATCHES.get(name, spec.batch), "seed": seed}
    batches = cases.curvature_batches(train, constants, **cut)
    estimators = {label: make(spec.model) for label, make in ESTIMATES.items()}
    times, states = {label: [] for label in estimators}, {}
    for _ in range(1 + repeats):
        for label, estimator in estimators.items():
            begin = time.process_time(), time.perf_counter()
            states[label] = jax.block_until_ready(
                flj.fit(estimator, params, batches, key=jax.random.key(seed))
            )
            end = time.process_time(), time.perf_counter()
            times[label].append([b - a for a, b in zip(begin, end, strict=True)])
    held_out = cases.curvature_batches(train, constants, beside=examples, **cut) if probes else []
    product = flj.curvature(spec.model, held_out).product if probes else None
    rows = []
    for label, estimator in estimators.items():
        cpu, clock = map(min, zip(*times[label][1:], strict=True))
        rows.append(
            {
                "case": name,
                "estimate": label,
                "examples": sum(len(jax.tree.leaves(b[0])[0]) for b in batches),
                "first": times[label][0][0],
                "cpu": cpu,
                "clock": clock,
                "ratio": cpu / (rows[0]["cpu"] if rows else cpu),
                "loss": held_out_loss(estimator, states[label], params, product, probes),
            }
        )
    return rows


def held_out_loss(estimator: Any, state: Any, params: Any, product: Any, probes: int) -> float:
    """Mean auxiliary loss of random signs, times γ/d, at the mean of the Fisher's diagonal.

    Args:
        estimator: the estimate.
        state: its state.
        params: the weights.
        product: product with the Fisher of held-out examples.
        probes: number of random vectors; 0 returns NaN.
    """
    leaves, tree = jax.tree.flatten(params)
    weights = sum(x.size for x in leaves)

    def probe(key):
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        return tree.unflatten([jax.random.rademacher(k, x.shape, x.dtype) for k, x in pairs])

    def dot(x, y):
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        return float(sum(jnp.vdot(a, b) for a, b in pairs))

    vectors = [probe(k) for k in jax.random.split(jax.random.key(7), probes)]
    if not vectors:
        return float("nan")
    damping = sum(dot(u, product(params, u)) for u in vectors) / (weights * probes)
    state, multiply = flj.inverse.with_damping(state, damping), jax.jit(estimator.multiply)
    total = 0.0
    for u in vectors:
        z = multiply(state, u)
        total += 0.5 * (dot(z, product(params, z)) + damping * dot(z, z)) - dot(u, z)
    return total * damping / (weights * probes)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = network_arguments.make_parser(
        "experiments.benchmarks.fit_price",
        "Time a fit of FishLeg against one of K-FAC.",
        CASES,
        option="--case",
    )
    arguments.option(parser, "--examples", arguments.at_least(1), 500, "of a fit")
    arguments.option(parser, "--repeats", arguments.at_least(1), 2)
    arguments.option(parser, "--probes", arguments.at_least(0), 2, "of the held-out loss")
    arguments.option(parser, "--seed", arguments.seed, 0)
    args = network_arguments.parse(parser, argv)
    how = {name: getattr(args, name) for name in ("examples", "repeats", "probes", "seed")}
    for name in args.model:
        print(tables.of_rows(measure(name, data_dir=args.data_dir, **how), COLUMNS), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
