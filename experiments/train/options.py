"""The arguments of `experiments.train`, all checked before anything is written."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.data import curves, datasets
from experiments.models.specs import MODELS, Spec
from experiments.running import arguments, results
from experiments.train import choice
from experiments.train.choice import Trials
from experiments.train.optimizers import OPTIMIZERS
from experiments.train.pruning import make_goal

# of each data set the model, the usual number of epochs and the weight decay
NETWORKS = {
    "digits": ("mlp", 20, 1e-3),
    "mnist": ("autoencoder", 3, 1e-5),
    "faces": ("faces", 20, 1e-5),
    "curves": ("curves", 10, 1e-5),
    "cifar10": ("resnet20", 10, 5e-4),
    "tinyshakespeare": ("transformer", 3, 1e-3),
}


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(
        "experiments.train", "Train networks from scratch, and compare optimisers."
    )
    add, option = parser.add_argument, partial(arguments.option, parser)
    whole = arguments.at_least(1)
    add("--dataset", choices=NETWORKS, default="digits", help="default: digits")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist and cifar10")
    names = ", ".join(OPTIMIZERS)
    add(
        "--optimizer",
        type=arguments.comma_list(arguments.one_of(OPTIMIZERS)),
        metavar="A,B",
        help=f"of {names}; default: all",
    )
    add(
        "--epochs",
        type=arguments.comma_list(whole),
        metavar="A,B",
        help="lengths, each a training of its own; default: the data set's",
    )
    add("--batch-size", type=whole, metavar="N", help="default: the model's")
    add("--weight-decay", type=arguments.not_negative, help="default: the data set's")
    option("--seed", arguments.seed, [0], "of weights and order of examples", several=True)
    option("--rates", arguments.positive, choice.RATES, "the grid of learning rates", several=True)
    add(
        "--rate",
        type=arguments.by_name(OPTIMIZERS, arguments.positive),
        default={},
        metavar="X|A=X,B=Y",
        help="learning rates by optimiser, instead of those chosen on the grid",
    )
    add(
        "--trial-steps",
        type=whole,
        metavar="N",
        help="length of the trials of rates; default: two epochs, and at most 300 steps",
    )
    add(
        "--prune",
        type=arguments.sparsity,
        metavar="S",
        help="sparsity that is reached on the way; the optimisers are then fishleg,adam by default",
    )
    option("--checkpoint-every", arguments.positive, 30.0, "seconds, at ends of epochs")
    option("--out", Path, Path("results/train"))
    return parser


def parse(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, Spec, datasets.Data, Trials]:
    """Reads and checks the arguments; a bad one ends the program before anything is written.

    Args:
        argv: The arguments; None for those of the command line.

    Returns:
        The arguments with their defaults, the model, its data set, and how rates are tried.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    name, epochs, decay = NETWORKS[args.dataset]
    spec = MODELS[name]
    args.epochs = args.epochs or [epochs]
    usual = ["fishleg", "adam"] if args.prune else list(OPTIMIZERS)
    args.optimizer = args.optimizer or usual
    args.weight_decay = decay if args.weight_decay is None else args.weight_decay
    args.batch_size = args.batch_size or spec.train_batch
    with arguments.refusing(parser, args.out):
        datasets.check(spec.dataset, args.data_dir)
        results.load(args.out / "results.json")
        if args.dataset == "curves":
            split = datasets.Data(*curves.load(args.out / "curves.npy"))
        else:
            split = datasets.load(spec.dataset, args.data_dir)
        trials = choice.make_trials(
            split.train, args.batch_size, tuple(args.rates), args.trial_steps
        )
        for epochs in args.epochs if args.prune else ():
            make_goal(args.prune, epochs * (len(split.train[0]) // args.batch_size))
        args.out.mkdir(parents=True, exist_ok=True)
    return args, spec, split, trials
