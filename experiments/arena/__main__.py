"""Sets all methods at their defaults against each other on networks of many kinds.

    python -m experiments.arena
    python -m experiments.arena --quick
    python -m experiments.arena --networks lstm,transformer --mode one_shot --seeds 0

Every method is called as the library documents it, with nothing tuned, and sees the same training
examples: in one shot a random choice of them for each seed, in gradual pruning the same batches in
the same order.  Wanda and SparseGPT, which prune trained networks layer by layer, stand beside in
one shot.  Networks without a checkpoint in the shared folder are trained first, with seed 0, and
kept in `--out`.  Test examples are used for the report only.

Writes `results.json`, an object for each network, mode, method, sparsity and seed; the test loss
of every example of each, in the folder `losses`; `duels.json`, FishLeg's differences from every
other method with paired 95 % intervals; and a picture for each mode.  Prints tables of the loss
above that of the dense network (at the start of gradual pruning), of accuracy, and of wins and
losses.  The same command goes on after it was stopped; see `--help`.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.arena import (
    contestants,
    duels,
    gradual,
    layerwise,
    networks,
    one_shot,
    record_table,
)
from experiments.arena.networks import NETWORKS, Contestant
from experiments.models import training
from experiments.models.specs import as_batch
from experiments.report import plots, record, tables
from experiments.running import arguments, files, results
from experiments.running.arguments import at_least, comma_list, one_of, seed, sparsity
from experiments.running.runner import Runner

METHODS = [*contestants.ARGUMENTS, *layerwise.METHODS]
MODES = ("one_shot", "gradual")
FULL = {
    "seeds": [0, 1, 2],
    "sparsities": [0.5, 0.7, 0.8, 0.9, 0.95, 0.98],
    "gradual_sparsities": [0.9, 0.95, 0.98],
    "examples": 1024,
    "steps": 200,
    "test_examples": 2000,
}
QUICK = {
    "seeds": [0],
    "sparsities": [0.7, 0.9],
    "gradual_sparsities": [0.9],
    "examples": 256,
    "steps": 60,
    "test_examples": 1000,
}
EPILOG = """
Results that are in results.json are not made again: those of the same network, method, mode,
sparsity, seed, weights and numbers of examples and steps, whatever the version of the library.  To
start afresh, delete --out or name another; the networks in it may stay.
"""


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(
        "experiments.arena", "Compare all methods at their defaults on networks of many kinds."
    )
    parser.epilog = EPILOG
    add, option = parser.add_argument, partial(arguments.option, parser)
    option("--networks", one_of(NETWORKS), list(NETWORKS), several=True)
    option("--methods", one_of(METHODS), METHODS, several=True)
    add("--mode", choices=[*MODES, "both"], default="both", help="default: both")

    def number(name: str, parse_one: Any, words: str = "", several: bool = False) -> None:
        full, quick = (
            ",".join(map(str, table[name])) if several else table[name] for table in (FULL, QUICK)
        )
        defaults = f"default: {full}, with --quick {quick}"
        add(
            f"--{name.replace('_', '-')}",
            type=comma_list(parse_one) if several else parse_one,
            metavar="A,B" if several else "N",
            help="; ".join(part for part in (words, defaults) if part),
        )

    number("seeds", seed, several=True)
    number("sparsities", sparsity, "of one-shot pruning", several=True)
    number("gradual_sparsities", sparsity, "of gradual pruning", several=True)
    number("examples", at_least(one_shot.BATCH), "training examples that a method sees in one shot")
    number("steps", at_least(50), "training steps of gradual pruning, a multiple of 10")
    number("test_examples", at_least(2), "the first N are evaluated on")
    add(
        "--quick",
        action="store_true",
        help="fewer seeds, sparsities, examples and steps, for all networks and methods",
    )
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist and cifar10")
    option("--out", Path, Path("results/arena"))
    record.add_option(parser)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with arguments.refusing(parser, args.out):
        gradual.make_plan(args.steps)
        for name in args.networks:
            networks.check(name, args.data_dir)
        results.load(args.out / "results.json")
        args.out.mkdir(parents=True, exist_ok=True)
    return args


def _example_losses(network: Contestant, params: Any, constants: Any) -> np.ndarray:
    """The test loss of every example, in nats; of a text per character."""
    inputs, targets = network.split.test
    cut = range(0, len(inputs), training.EVALUATION_BATCH)
    parts = [slice(begin, begin + training.EVALUATION_BATCH) for begin in cut]
    batches = [as_batch(inputs[part], targets[part], constants) for part in parts]
    likelihood = network.spec.model.likelihood
    losses = [_losses(network.spec.model, likelihood, params, batch) for batch in batches]
    is_text = network.spec.mean is None and targets.ndim > 1
    return np.concatenate(losses).astype(np.float32) / (targets[0].size if is_text else 1)


@partial(jax.jit, static_argnames=("model", "likelihood"))
def _losses(model: flj.Model, likelihood: Any, params: Any, batch: tuple) -> jax.Array:
    outputs = model.predict(params, batch[0], *batch[2:])
    return likelihood.negative_log_likelihood(outputs, batch[1])


def _score(network: Contestant, params: Any, constants: Any) -> float:
    """Accuracy in percent, or the squared error of an auto-encoder."""
    spec = network.spec
    return training.evaluate(spec.model, params, network.split.test, constants, spec.mean)[0]


def _zero_loss(network: Contestant) -> float:
    """The test loss with all prunable weights zero, which is about that of a constant output."""
    chosen = flj.make_masks(
        jax.tree.map(jnp.abs, network.params), 0.5, scope="layer", prunable=network.spec.prunable
    )
    bare = jax.tree.map(lambda w, m: w if m.all() else 0 * w, network.params, chosen)
    return float(_example_losses(network, bare, network.constants).mean())


def _made(
    args: argparse.Namespace, network: Contestant, mode: str, method: str, number: int, wanted: list
) -> Iterator[tuple[float, Any, Any, dict]]:
    """Pruned weights of one method and seed, at the sparsities wanted."""
    if mode == "one_shot":
        yield from one_shot.prune(method, network, wanted, examples=args.examples, seed=number)
    else:
        for target in wanted:
            pruned = gradual.prune(method, network, target, steps=args.steps, seed=number)
            yield target, *pruned


def run(args: argparse.Namespace, name: str, runner: Runner) -> None:
    """All methods, modes, sparsities and seeds of one network, but those that are there already.

    Args:
        args: the arguments.
        name: the network.
        runner: takes the results.
    """
    network = networks.load(
        name,
        train_in=args.out / "networks",
        data_dir=args.data_dir,
        test_examples=args.test_examples,
    )
    spec, weights = network.spec, results.fingerprint((network.params, network.constants))
    dense = _score(network, network.params, network.constants)
    dense_loss = float(_example_losses(network, network.params, network.constants).mean())
    fields = {
        "dense_score": dense,
        "dense_loss": dense_loss,
        "zero_loss": _zero_loss(network),
        "score_is": "accuracy, %" if spec.mean is None else "squared error",
    }
    print(f"{name}: loss {dense_loss:.4g}, {fields['score_is']} {dense:.4g}", flush=True)
    for mode in MODES if args.mode == "both" else (args.mode,):
        own = {"examples": args.examples} if mode == "one_shot" else {"steps": args.steps}
        targets = args.sparsities if mode == "one_shot" else args.gradual_sparsities
        settings = {"weights": weights, "test_examples": len(network.split.test[0]), **own}
        for number in args.seeds:
            for method in args.methods:
                if mode == "gradual" and method in layerwise.METHODS:
                    continue  # they prune trained networks
                identity = {"model": name, "dataset": spec.dataset, "mode": mode}
                identity |= {"method": method, "seed": number, "settings": settings}
                wanted = [{"sparsity_target": target} for target in targets]
                missing = [one["sparsity_target"] for one in runner.missing(identity, wanted)]
                if not missing:
                    continue
                title = f"{name}, {mode}, {method}, seed {number}"
                # one method that fails must not end the others
                with runner.attempt(title, FloatingPointError, ValueError, RuntimeError):
                    for made in _made(args, network, mode, method, number, missing):
                        row = _row(args.out, network, identity, fields, *made)
                        runner.keep(row)
                        print(f"{title}: {_line(row)}", flush=True)


def _line(row: dict) -> str:
    above = "not finite" if row["above_dense"] is None else f"{row['above_dense']:.4g} above dense"
    return f"{100 * row['sparsity_target']:g} %, loss {above}, {row['seconds']:.1f} s"


def _row(
    out: Path,
    network: Contestant,
    identity: dict,
    fields: dict,
    target: float,
    params: Any,
    constants: Any,
    further: dict,
) -> dict[str, Any]:
    """The object of a pruned network, whose losses are written first."""
    losses = _example_losses(network, params, constants)
    names = (identity[name] for name in ("model", "mode", "method"))
    settings = "_".join(str(value)[:8] for value in identity["settings"].values())
    stem = f"{'_'.join(names)}_{target:g}_seed{identity['seed']}_{settings}"
    path = Path("losses") / f"{stem}.npy"
    files.write(out / path, lambda beside: np.save(beside, losses))
    loss = float(losses.mean())
    row = {
        **identity,
        "sparsity_target": target,
        "sparsity": flj.sparsity(params, network.spec.prunable),
        "loss": loss,
        "above_dense": loss - fields["dense_loss"],
        "score": _score(network, params, constants),
        **fields,
        **further,
        "losses": str(path),
    }
    return files.without_nan(row)


def show(rows: Sequence[dict]) -> str:
    """Tables of the loss above dense, of the score and of seconds, for each mode and network.

    Args:
        rows: the objects of `results.json`.
    """

    def median(values: Sequence[float | None]) -> str:
        # a loss that is not finite is the worst
        numbers = [float("inf") if value is None else value for value in values]
        return f"{statistics.median(numbers):.3g}" if numbers else "–"

    def seconds(own: Sequence[dict]) -> str:
        return median([row["seconds"] for row in own])

    shown = []
    for mode in MODES:
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if (row["mode"], row["model"]) == (mode, name)]
            if own:
                title = f"{name}, {mode}"
                further = {"s": seconds}
                shown += [
                    tables.by_sparsity(
                        own, "above_dense", f"{title}: loss above dense", median, further
                    ),
                    tables.by_sparsity(own, "score", f"{title}: {own[0]['score_is']}", median),
                ]
    return "\n\n".join(shown)


def _cuts(args: argparse.Namespace) -> str:
    """What `--quick` leaves out of the whole arena."""
    cuts = [
        f"{name.replace('_', ' ')} {getattr(args, name)} instead of {whole}"
        for name, whole in FULL.items()
        if getattr(args, name) != whole
    ]
    return f"quick: {'; '.join(cuts)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code: 1 if a method failed somewhere.
    """
    args = _parse(argv)
    if args.quick:
        print(_cuts(args), flush=True)
    runner = Runner(args.out / "results.json")
    for name in args.networks:
        run(args, name, runner)
        jax.clear_caches()  # compiled programs of all networks would fill the memory
    rows = runner.rows
    if rows:
        print(show(rows))
        fought = duels.fight(args.out, rows)
        best = duels.best_peers(rows, fought, contestants.PEERS)
        if fought:
            print(f"\n{duels.show(fought, best)}")
            print(files.write_json(args.out / "duels.json", duels.as_json(fought)))
        print(runner.path)
        for mode in dict.fromkeys(row["mode"] for row in rows):
            own = [row for row in rows if row["mode"] == mode]
            print(plots.loss_above_dense(args.out / f"{mode}.png", own))
            made = record_table.of_mode(rows, best, mode)
            record.keep(args.record and f"{args.record}_{mode}", made, "experiments.arena", argv)
    return runner.exit_code()


if __name__ == "__main__":
    sys.exit(main())
