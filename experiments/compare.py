"""Compares all methods on one network, with the same data for the curvature of each.

    python -m experiments.compare
    python -m experiments.compare --model mlpnet --checkpoint mlpnet_mnist.npz --seed 0,1,2

Every method × sparsity × seed goes into `results.json` of `--out`, in the objects that
`experiments.one_shot` writes, with three fields more: `fit_seconds`, `prune_seconds` and
`peak_memory_bytes`, see `experiments.memory`.  With `--finetune` each pruned network is trained on
with its masks held, for `finetuned_accuracy`, `finetuned_loss` and `finetune_seconds`.  Prints
tables of accuracy and loss with the median and the range over seeds, and draws
`accuracy_vs_sparsity.png`.  The same command goes on after it was stopped; see `--help`.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax

import fishleg_jax as flj
from experiments import (
    arguments,
    comparing,
    data,
    methods,
    one_method,
    plots,
    results,
    tables,
    training,
)
from experiments.models import Spec, as_batch

DEFAULT = ("magnitude", "diagonal", "kfac", "woodfisher", "mfac", "fishleg")
RESUMING = """
Each result is written as soon as it is there.  What --out has already is
not computed again: results of the same method, settings, sparsity, seed, images and weights.
Results of other settings stay in its results.json beside the new ones, and out of the tables and
of the picture.  Weights that were trained are kept in --out and used again.  To start afresh,
delete --out or name another.
"""


def _parser() -> argparse.ArgumentParser:
    parser = arguments.pruning_parser(
        "experiments.compare",
        "Compare methods of pruning on one network, with the same training images for all.",
        methods=methods.METHODS,
        default=DEFAULT,
        compensations=["independent", "group", "none"],
    )
    parser.epilog = RESUMING
    add = parser.add_argument
    damped = [name for name, method in methods.METHODS.items() if "damping" in method.takes]
    add(
        "--damping",
        type=arguments.by_name(damped, arguments.positive),
        default={},
        metavar="X|A=X,B=Y",
        help="of all methods, or by name; default: each method's own",
    )
    add(
        "--gradients",
        type=arguments.at_least(1),
        metavar="M",
        help="how many gradients woodfisher and mfac make of the images, all means over as many; "
        "what does not divide no method sees; default: 1000, or one for each image",
    )
    add(
        "--block-size",
        type=arguments.block_size,
        metavar="none|leaf|N",
        help="weights in a block of woodfisher and mfac; default: none, one block of all",
    )
    add("--labels", choices=["empirical", "sampled"], help="default: each method's own")
    add(
        "--target",
        type=arguments.comma_list(arguments.target),
        metavar="A:X,B:Y",
        help="instead of --sparsity: at most so many weights, bytes or flops (of what may be "
        "pruned) are kept, or as many pruned as raise the loss by at most X nats, or cost at most "
        "X points of accuracy, both measured on the --held-out images or else the curvature's",
    )
    add(
        "--selection",
        choices=["none", "swaps", "qubo", "annealing"],
        default="none",
        help="what betters the masks: swaps on the compensated cost, or a QUBO",
    )
    add(
        "--border",
        type=arguments.at_least(2),
        default=256,
        help="how many weights nearest to the threshold --selection may swap; default: 256",
    )
    add(
        "--fisher",
        choices=["exact", "estimate"],
        default="exact",
        help="of the solves of --compensation group: estimate is for mfac alone; default: exact",
    )
    add("--scale", type=arguments.share, help="of the update of kept weights, in [0, 1]; default 1")
    add("--first-order", action="store_true", help="the gradient takes part (WoodTaylor)")
    add("--stages", type=arguments.at_least(1), default=1, help="default: 1, one shot")
    add(
        "--schedule",
        choices=["geometric", "linear", "polynomial"],
        default="geometric",
        help="of the sparsity over stages",
    )
    add(
        "--path",
        action="store_true",
        help="one pruning passes through all sparsities, with --stages to the highest",
    )
    add(
        "--fresh",
        action="store_true",
        help="each stage sees --examples images that were seen least",
    )
    add(
        "--held-out",
        type=arguments.at_least(1),
        metavar="N",
        help="further training images, by whose loss steps are checked",
    )
    add(
        "--solve-damping",
        type=arguments.positive,
        metavar="X",
        help="of the solves of --compensation group; default: that of the estimate",
    )
    add("--iterations", type=arguments.at_least(1), help="of a solve; default: 25")
    add(
        "--fixed-damping",
        action="store_true",
        help="group starts every stage with the same damping, instead of adapting the method's own",
    )
    add(
        "--augment",
        action="store_true",
        help="the curvature sees images of cifar10 as training does, shifted and flipped",
    )
    add(
        "--recalibrate",
        action="store_true",
        help="recompute batch-norm statistics after every stage, on its images, for the next",
    )
    add("--costs", choices=["none", "flops", "bytes"], default="none", help="that divide scores")
    add(
        "--trust",
        action="store_true",
        help="measure how far two halves of the images agree "
        "on a pruning in one shot, without --first-order and --costs",
    )
    add(
        "--finetune",
        type=arguments.at_least(1),
        metavar="EPOCHS",
        help="train on after pruning, on all training images with pruned weights held at zero, "
        "and evaluate once more",
    )
    add(
        "--finetune-rate",
        type=arguments.positive,
        metavar="X",
        help="the largest learning rate of --finetune; default: a tenth of the model's",
    )
    return parser


def _check(args: argparse.Namespace, spec: Spec, split: data.Data) -> None:
    """Raises a ValueError where arguments do not fit together, or what they ask for can't be."""
    results.load(args.out / "results.json")
    params, constants = _shapes(spec)
    if args.target:
        if args.path or args.trust or (args.selection != "none" and _are_costs(args.target)):
            raise ValueError(
                "--target goes with neither --path nor --trust, and bytes and flops not with "
                "--selection"
            )
        args.sparsity = args.target
    if args.fisher != "exact" and (args.compensation != "group" or args.method != ["mfac"]):
        raise ValueError("--fisher estimate is for --compensation group and --method mfac")
    if args.compensation == "none" and args.scale is not None:
        raise ValueError("--scale is that of an update, --compensation none makes none")
    args.scale = 1.0 if args.scale is None else args.scale
    part = _part(args, spec)
    if args.compensation != "group":
        for name in ("fixed_damping", "solve_damping", "iterations"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} is for --compensation group")
    if args.compensation == "group" and args.scale != 1:
        raise ValueError("--scale is for --compensation independent")
    if args.fresh and args.stages == 1:
        raise ValueError("--fresh is for several --stages")
    if args.path and args.stages < max(len(args.sparsity), 2):
        raise ValueError(
            f"--path needs a stage for each of {len(args.sparsity)} sparsities and at least two, "
            f"got --stages {args.stages}"
        )
    if args.held_out and args.compensation == "none":
        raise ValueError("--held-out checks an update, --compensation none makes none")
    if args.augment and spec.dataset != "cifar10":
        raise ValueError("--augment is for cifar10")
    if args.recalibrate and (args.stages == 1 or not jax.tree.leaves(constants)):
        raise ValueError("--recalibrate is for several --stages of a model with batch norm")
    if args.finetune_rate and not args.finetune:
        raise ValueError("--finetune-rate is that of --finetune EPOCHS")
    comparing.check_images(args, part, len(split.train[0]))
    if args.trust and part.gradients < 2:
        raise ValueError("--trust halves the gradients, and there is only one")
    _costs(args, spec, params, constants)
    for method in args.method:
        try:
            estimator = comparing.make_estimator(method, args, spec, part)
            jax.eval_shape(estimator.init, params)
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from error


def _are_costs(targets: Sequence[str]) -> bool:
    return any(target.startswith(("bytes", "flops")) for target in targets)


def _part(args: argparse.Namespace, spec: Spec) -> methods.Share:
    return methods.share(args.examples or spec.examples, args.gradients)


def _shapes(spec: Spec) -> tuple[Any, Any]:
    return jax.eval_shape(spec.init, jax.random.key(0))


def _costs(args: argparse.Namespace, spec: Spec, params: Any, constants: Any) -> Any:
    if args.costs == "none":
        return None
    inputs = jax.ShapeDtypeStruct((1, *spec.input_shape), spec.input_dtype)
    batch = as_batch(inputs, None, constants)
    return flj.weight_costs(spec.model, params, batch, unit=args.costs)


def _weights(job: comparing.Job, loaded: Any, seed: int) -> tuple[Any, Any]:
    """The parameters and constants: those of the checkpoint, or trained and kept in `--out`."""
    if loaded is not None:
        return loaded
    args, spec = job.args, job.spec
    path = args.out / f"{spec.name}_{args.epochs or spec.epochs}epochs_seed{seed}.npz"
    if not path.exists():
        print(path)
    return training.trained(spec, job.split.train, path, epochs=args.epochs, seed=seed)


def run(
    args: argparse.Namespace, spec: Spec, split: data.Data, loaded: Any
) -> tuple[list[dict], list[str]]:
    """All methods, sparsities and seeds, without those that `results.json` has already.

    Args:
        args: the arguments.
        spec: the model.
        split: the data set.
        loaded: trained parameters and constants; None to train.

    Returns:
        The objects of `results.json` that belong to the arguments, and what failed in words.
    """
    costs = _costs(args, spec, *_shapes(spec))
    job = comparing.Job(args, spec, split, _part(args, spec), costs)
    path = args.out / "results.json"
    rows, failures, cold = [], [], True

    def keep(row: dict) -> None:
        results.add(path, [row])
        rows.append(row)

    for seed in args.seed:
        params, constants = _weights(job, loaded, seed)
        weights, dense = results.fingerprint((params, constants)), None
        for method in args.method:
            settings = comparing.settings_of(method, job, weights)
            identity = {
                "method": method,
                "dataset": spec.dataset,
                "model": spec.name,
                "curvature_examples": comparing.images_of(method, job),
                "seed": seed,
                "settings": dict.fromkeys(comparing.OPTIONAL) | settings,
            }
            stored = results.load(path)
            there = {
                target: results.find(stored, sparsity_target=target, **identity)
                for target in args.sparsity
            }
            missing = [target for target, row in there.items() if row is None]
            rows += [row for row in there.values() if row is not None]
            if len(missing) < len(there):
                known = f"{len(there) - len(missing)} of {len(there)} sparsities"
                print(f"seed {seed}, {method}: {known} are in {path} already")
            if not missing:
                continue
            dense = dense or results.evaluated(spec, split, params, constants)
            if cold:
                one_method.warm_up(job, dense)
                cold = False
            try:
                one_method.prune(method, job, dense, missing, settings, seed, keep)
            except FloatingPointError as error:
                failures.append(f"seed {seed}, {method}: {error}")
    return rows, failures


def show(rows: Sequence[dict], finetuned: bool = False) -> str:
    """Tables of accuracy and loss, and of trust where it was measured.

    Seconds are medians over sparsities and seeds, the peak of memory is the highest.

    Args:
        rows: the objects of a `results.json`.
        finetuned: whether they were trained on, for tables of that.
    """

    def column(field, unit, digits, of=statistics.median):
        def cell(own):
            values = [row[field] for row in own if row[field] is not None]
            return f"{of(values) / unit:.{digits}f}" if values else "–"

        return cell

    further = {
        "fit, s": column("fit_seconds", 1, 1),
        "prune, s": column("prune_seconds", 1, 1),
        "peak, MB": column("peak_memory_bytes", 1e6, 0, max),
    }
    shown = []
    for prefix, title in tables.measurements(rows).items():
        shown += _accuracy_and_loss(rows, prefix, title, {} if prefix else further)
    if any(isinstance(row["sparsity_target"], str) for row in rows):
        reached = [row | {"percent": 100 * row["sparsity"]} for row in rows]
        shown.insert(0, tables.by_sparsity(reached, "percent", "sparsity, %", tables.spread))
    asked = [row for row in rows if "agreement" in row]
    if asked:
        shown += [
            tables.by_sparsity(asked, "agreement", "agreement of halves", tables.spread),
            tables.by_sparsity(asked, "inflation", "inflation, other half", tables.spread),
        ]
    if finetuned:
        after = {"fine-tuning, s": column("finetune_seconds", 1, 1)}
        shown += [
            tables.by_sparsity(rows, "finetuned_accuracy", "fine-tuned, %", tables.spread, after),
            tables.by_sparsity(
                rows, "finetuned_loss", "fine-tuned, nats", lambda values: tables.spread(values, 3)
            ),
        ]
    return "\n\n".join(shown)


def _accuracy_and_loss(rows: Sequence[dict], prefix: str, title: str, further: dict) -> list[str]:
    accuracy, loss = f"{prefix}accuracy", f"{prefix}loss"
    return [
        tables.by_sparsity(rows, accuracy, f"{title}test accuracy, %", tables.spread, further),
        tables.by_sparsity(
            rows, loss, f"{title}test loss, nats", lambda values: tables.spread(values, 3)
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    args, spec, split, loaded = arguments.parse(_parser(), argv, _check)
    rows, failures = run(args, spec, split, loaded)
    if rows:
        print(show(rows, finetuned=args.finetune is not None))
        path = args.out / "results.json"
        others = len(results.load(path)) - len(rows)
        print(f"{path} ({others} results of other settings too)" if others else path)
        print(plots.accuracy_vs_sparsity(args.out / "accuracy_vs_sparsity.png", rows))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
