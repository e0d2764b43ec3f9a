"""The arguments of `experiments.compare`, and checks of their combinations."""

import argparse
from collections.abc import Sequence

import jax

import fishleg_jax as flj
from experiments.compare import comparison
from experiments.compare.comparison import batch_shapes
from experiments.data import datasets
from experiments.estimates import methods
from experiments.models.specs import Spec
from experiments.report import record
from experiments.running import arguments, processes, results
from fishleg_jax.pruning.masks.groups import make_groups
from fishleg_jax.pruning.one_shot import budget as _budget
from fishleg_jax.pruning.one_shot import goal

DEFAULT = ("magnitude", "diagonal", "kfac", "woodfisher", "mfac", "fishleg")
RESUMING = """
Each result is written as soon as it is there.  What --out has already is
not computed again: results of the same method, settings, sparsity, seed, images and weights.
Results of other settings stay in its results.json beside the new ones, and out of the tables and
of the picture.  Weights that were trained are kept in --out and used again.  To start afresh,
delete --out or name another.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all arguments."""
    parser = arguments.pruning_parser(
        "experiments.compare",
        "Compare methods of pruning on one network, with the same training images for all.",
        methods=methods.METHODS,
        default=DEFAULT,
        compensations=["independent", "group", "none"],
    )
    parser.epilog = RESUMING
    parser.set_defaults(sparsity=None)  # those of `arguments`, where there is no --target either
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
        help="gradients that woodfisher and mfac make of the images, each a mean over as many; "
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
        help="instead of --sparsity: the most weights, bytes or flops (of what may be "
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
        help="weights nearest to the threshold that --selection may swap; default: 256",
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
        help="of the solves of --compensation group; default: chosen by the loss",
    )
    add("--iterations", type=arguments.at_least(1), help="of a solve; default: 25")
    add(
        "--saliency",
        choices=("obs", "obd", "mixture", "magnitude", "auto"),
        default="obs",
        help="scores of the weights; auto chooses by the loss of --held-out images",
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
    arguments.add_memory_options(parser)
    processes.add_options(parser)
    record.add_option(parser)
    return parser


def check(args: argparse.Namespace, spec: Spec, split: datasets.Data) -> None:
    """Raises a ValueError if arguments do not fit together or can't be satisfied."""
    results.load(args.out / "results.json")
    params, constants = comparison.shapes(spec)
    if args.target:
        if args.path or args.trust or (args.selection != "none" and _are_costs(args.target)):
            raise ValueError(
                "--target goes with neither --path nor --trust, and bytes and flops not with "
                "--selection"
            )
        if args.sparsity:
            raise ValueError("--target is instead of --sparsity, not beside it")
        _check_targets(args.target, spec, args.scope)
        args.sparsity = args.target
    args.sparsity = args.sparsity or arguments.SPARSITIES
    if args.first_order and args.selection in ("qubo", "annealing"):
        raise ValueError(f"--first-order: --selection {args.selection} has no gradient, swaps has")
    if args.first_order and args.method == ["magnitude"]:
        raise ValueError("--first-order: --method magnitude takes no gradient, other methods do")
    if args.fisher != "exact" and (args.compensation != "group" or args.method != ["mfac"]):
        raise ValueError("--fisher estimate is for --compensation group and --method mfac")
    if args.compensation == "none" and args.scale is not None:
        raise ValueError("--scale is that of an update, --compensation none makes none")
    args.scale = 1.0 if args.scale is None else args.scale
    part = comparison.make_comparison(args, spec, split).part
    if args.compensation != "group":
        for name in ("solve_damping", "iterations"):
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
    wanted, available = part.examples + (args.held_out or 0), len(split.train[0])
    if args.held_out and wanted > available:
        raise ValueError(
            f"{part.examples} images and {args.held_out} held out are {wanted} images, and the "
            f"training data has {available}"
        )
    if args.trust and part.gradients < 2:
        raise ValueError("--trust halves the gradients, and there is only one")
    for method in args.method:
        try:
            estimator = comparison.make_estimator(method, args, spec, part)
            jax.eval_shape(estimator.init, params)
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from error


def _check_targets(targets: Sequence[str], spec: Spec, scope: str) -> None:
    """Raises a ValueError for a number of weights, or their cost, that can't be reached."""
    params, _ = comparison.shapes(spec)
    groups = make_groups(params, spec.prunable, scope)
    for target in targets:
        name, _, number = target.partition(":")
        try:
            if name == "weights":
                at_most = flj.targets.weights(int(float(number)))
                goal.sparsity_or_target(at_most, groups)
            elif _are_costs([target]):
                budget, batch = getattr(flj.targets, name)(float(number)), batch_shapes(spec)
                _budget.costs_of(budget, spec.model, params, batch, groups.chosen, scope)
        except ValueError as error:
            raise ValueError(
                f"--target {target}: {str(error).removeprefix('sparsity: ')}"
            ) from None


def _are_costs(targets: Sequence[str]) -> bool:
    return any(target.startswith(("bytes", "flops")) for target in targets)
