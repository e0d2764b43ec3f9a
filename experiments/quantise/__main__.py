"""Prunes and quantises layers as one QUBO: solvers by energy and seconds, and the network's loss.

    python -m experiments.quantise
    python -m experiments.quantise --model resnet20 --bits 2 --sparsity 0.5

The weights into one output are a block, with the second moment of what they see as their Fisher (up
to a factor for the output, which changes nothing).  First the solvers are compared on a few blocks,
small ones against all possibilities (brute force) and whole rows against rounding: energies over
that of rounding the weights with the largest scores, and seconds without compilation.  `one hard
penalty` is annealing with a penalty for the number of zeros ten times the largest change by one
weight.  Then every layer is quantised, by rounding and by moves, layer after layer with the inputs
of the dense network; biases, norms and the output layer stay.  Scales are the same for all solvers.
The second moments are those of training examples, accuracies those of test examples.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.arena import layer_inputs
from experiments.data import datasets
from experiments.models import cases
from experiments.models.specs import MODELS, Spec
from experiments.quantise import genetic
from experiments.report import plots, record
from experiments.running import arguments, files, results
from fishleg_jax.pruning.selection import _annealing

DAMPING = 0.01  # of the mean of the second moment's diagonal
SMALL = 8  # weights of a small block
SOLVERS = ("rounding", "moves", "annealed moves", "annealing", "one hard penalty", "genetic")


class Block(NamedTuple):
    """Weights into one output, their Fisher, and the number of those that stay."""

    weights: np.ndarray
    fisher: np.ndarray
    keep: int


def solve(solver: str, block: Block, bits: int, seed: int) -> flj.selection.Quantised:
    """Solves one block by one solver.

    Args:
        solver: one of `SOLVERS`, or `brute force`.
        block: the block.
        bits: of a kept weight, besides its sign.
        seed: of the random numbers.
    """
    options = {"keep": block.keep, "bits": bits, "seed": seed}
    if solver in ("moves", "annealed moves", "annealing"):
        return flj.selection.quantise(block.weights, block.fisher, solver=solver, **options)
    if solver == "one hard penalty":
        shares, _annealing.PENALTIES = _annealing.PENALTIES, (10.0,)
        try:
            return flj.selection.quantise(
                block.weights, block.fisher, solver="annealing", steps=1, **options
            )
        finally:
            _annealing.PENALTIES = shares
    first = flj.selection.quantise(block.weights, block.fisher, steps=1, **options)
    if solver == "rounding":
        return first._replace(after=first.before)
    w, fisher = np.asarray(block.weights, float), np.asarray(block.fisher, float)
    unit = float(first.scale) * np.where(w < 0, -1.0, 1.0)
    top = 2**bits
    if solver == "genetic":
        start = _rounded(block, float(first.scale), top)
        found = genetic.search(start, w, fisher, unit, top=top, generations=100, seed=seed)
    else:
        found = genetic.brute_force(block.keep, w, fisher, unit, top=top)
    return first._replace(after=genetic.cost(found, w, fisher, unit))


def _rounded(block: Block, scale: float, top: int) -> np.ndarray:
    kept = np.argsort(-(block.weights**2) * np.diagonal(block.fisher), kind="stable")[: block.keep]
    levels = np.zeros(len(block.weights), int)
    levels[kept] = np.clip(np.round(np.abs(block.weights[kept]) / scale), 1, top)
    return levels


def layers_of(spec: Spec, params: Any, batches: Sequence[tuple]) -> dict[str, tuple]:
    """Weights `(outputs, columns)` and Fisher `(columns, columns)` of each layer but the last."""
    found = {}
    for path in layer_inputs.order(spec, params, batches[0])[:-1]:
        kernel = layer_inputs.leaf(params, path)["kernel"]
        moments = layer_inputs.second_moments(spec, params, batches, path)
        if moments.shape[:2] != (1, 1):
            continue  # stacked or grouped layers
        fisher = np.array(moments[0, 0], np.float64) / sum(len(batch[0]) for batch in batches)
        fisher += DAMPING * np.mean(np.diagonal(fisher)) * np.eye(len(fisher))
        found[path] = np.asarray(layer_inputs.as_matrices(kernel, 1)[0]), fisher.astype(np.float32)
    return found


def compared(
    blocks: Sequence[Block], solvers: Sequence[str], bits: int, seed: int
) -> list[dict[str, Any]]:
    """Energies over that of rounding, and seconds, of every solver on every block."""
    rows = []
    for solver in solvers:
        if solver not in ("genetic", "brute force"):
            for block in {len(block.weights): block for block in blocks}.values():
                solve(solver, block, bits, seed)  # compiles
        energies, begin = [], time.perf_counter()
        for i, block in enumerate(blocks):
            found = solve(solver, block, bits, seed + i)
            energies.append(float(found.after) / float(found.before))
        seconds = (time.perf_counter() - begin) / len(blocks)
        rows.append({"solver": solver, "energies": energies, "seconds": seconds})
    return rows


def quantised(
    weights: np.ndarray, fisher: np.ndarray, sparsity: float, bits: int, moves: bool
) -> jax.Array:
    """All rows of a layer, each with the same number of zeros."""
    keep = max(round((1 - sparsity) * weights.shape[1]), 1)
    steps = 10_000 if moves else 1
    row = jax.jit(
        jax.vmap(
            lambda w: flj.selection.quantise(
                w, jnp.asarray(fisher), keep=keep, bits=bits, steps=steps
            )
        )
    )
    found = row(jnp.asarray(weights))
    if moves:
        return found.weights
    return jnp.stack(
        [
            np.where(w < 0, -1, 1) * s * _rounded(Block(w, fisher, keep), float(s), 2**bits)
            for w, s in zip(weights, np.asarray(found.scale), strict=True)
        ]
    ).astype(jnp.float32)


def network(
    spec: Spec, dense: results.Dense, layers: Mapping[str, tuple], data: datasets.Data, args: Any
) -> list[dict[str, Any]]:
    """Accuracy and loss of the network with all layers quantised."""
    rows = [{"how": "dense", "accuracy": dense.accuracy, "loss": dense.loss}]
    for moves in (False, True):
        params = jax.tree.map(lambda x: x, dense.params)
        for path, (weights, fisher) in layers.items():
            found = quantised(weights, fisher, args.sparsity, args.bits, moves)
            layer = layer_inputs.leaf(params, path)
            layer["kernel"] = layer_inputs.as_kernel(found[None], layer["kernel"].shape)
        accuracy, loss = results.measure(spec, params, data.test, dense.constants)
        rows.append({"how": "moves" if moves else "rounding", "accuracy": accuracy, "loss": loss})
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command("experiments.quantise", "Prune and quantise as one QUBO.")
    option, out = arguments.option, Path("results/quantise")
    one = arguments.one_of(arguments.CLASSIFIERS)
    option(parser, "--model", one, "mlp", f"of {', '.join(arguments.CLASSIFIERS)}")
    parser.add_argument("--data-dir", type=Path, help="where TensorFlow Datasets has its data")
    option(parser, "--bits", arguments.at_least(0), 0, "of a kept weight, besides its sign")
    option(parser, "--sparsity", arguments.sparsity, 0.7)
    option(parser, "--blocks", arguments.at_least(1), 8, "of each size, to compare solvers")
    option(parser, "--examples", arguments.at_least(1), 1024, "for the second moments")
    option(parser, "--seed", arguments.seed, [0], several=True)
    parser.add_argument("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    return parser


def _blocks(layers: Mapping[str, tuple], args: Any, seed: int) -> dict[str, list[Block]]:
    """Small blocks and whole rows of random layers."""
    rng = np.random.default_rng(seed)
    small, whole = [], []
    for _ in range(args.blocks):
        weights, fisher = list(layers.values())[rng.integers(len(layers))]
        row = weights[rng.integers(len(weights))]
        few = rng.permutation(len(row))[:SMALL]
        # what the other weights do stays as it is
        small.append(Block(row[few], fisher[np.ix_(few, few)], SMALL // 2))
        whole.append(Block(row, fisher, max(round((1 - args.sparsity) * len(row)), 1)))
    return {f"{SMALL} weights": small, "rows": whole}


def table(found: Mapping[str, list[dict]], networks: Sequence[dict], args: Any) -> record.Table:
    """Energies and seconds of the solvers, and the networks."""
    cells: list[list[record.Cell]] = [
        [f"{size}: {row['solver']}", record.spread(row["energies"]), row["seconds"], None, None]
        for size, own in found.items()
        for row in own
    ]
    for how in dict.fromkeys(row["how"] for row in networks):
        own = [row for row in networks if row["how"] == how]
        spreads = [record.spread([row[field] for row in own]) for field in ("accuracy", "loss")]
        cells.append([f"network: {how}", None, None, *spreads])
    return record.Table(
        title=f"{args.model}, {args.sparsity:.0%} zeros and {args.bits} bits besides the sign",
        columns=["", "energy over rounding's", "seconds a block", "accuracy, %", "loss"],
        rows=cells,
        decimals=[0, 3, 4, 2, 4],
        seed=", ".join(map(str, args.seed)),
        data=MODELS[args.model].dataset,
        examples=f"{args.examples:,} training examples for second moments; all test examples",
        note=f"Median over {args.blocks} blocks of each seed, or over seeds, with the least and "
        "the largest; blocks of 8 weights have 4 zeros.",
    )


def run_seed(args: Any, seed: int) -> tuple[dict[str, list[dict]], list[dict]]:
    """Solvers on the blocks of one network, and the network quantised."""
    spec = MODELS[args.model]
    params, constants, train = cases.network(
        spec.name, train_in=args.out, data_dir=args.data_dir, seed=seed
    )
    data = datasets.load(spec.dataset, args.data_dir)
    batches = cases.curvature_batches(
        train, constants, examples=args.examples, batch_size=spec.batch, seed=seed
    )
    layers = layers_of(spec, params, batches)
    found = {
        size: compared(own, (*SOLVERS, *(["brute force"] * (size != "rows"))), args.bits, seed)
        for size, own in _blocks(layers, args, seed).items()
    }
    dense = results.evaluated(spec, data, params, constants)
    return found, network(spec, dense, layers, data, args)


def joined(parts: Sequence[Mapping[str, list[dict]]]) -> dict[str, list[dict]]:
    """Energies of the blocks of all seeds, and the mean of their seconds."""
    return {
        size: [
            {
                "solver": rows[0]["solver"],
                "energies": [x for row in rows for x in row["energies"]],
                "seconds": float(np.mean([row["seconds"] for row in rows])),
            }
            for rows in zip(*(part[size] for part in parts), strict=True)
        ]
        for size in parts[0]
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    with arguments.refusing(parser, args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        cases.check(args.model, args.data_dir)
    runs = [run_seed(args, seed) for seed in args.seed]
    found = joined([solvers for solvers, _ in runs])
    networks = [row for _, rows in runs for row in rows]
    made = table(found, networks, args)
    print(made)
    print(files.write_json(args.out / "results.json", [{"solvers": found, "networks": networks}]))
    print(plots.energies(args.out / "energies.png", found))
    record.keep(args.record, made, "experiments.quantise", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
