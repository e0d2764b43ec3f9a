"""The arguments of experiments that prune one network, all checked before anything is done."""

import argparse
import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import checkpoints
from experiments.models.specs import MODELS, Spec
from experiments.running import processes

SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
CLASSIFIERS = ("cnn", "mlp", "mlpnet", "resnet20")


Parser = Callable[[str], Any]


def _checked(convert: Parser, valid: Callable[[Any], bool], expected: str) -> Parser:
    def parse_one(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse_one


def one_of(names: Collection[str]) -> Parser:
    """Makes a function that reads one of some names, for `argparse`'s `type`."""
    return _checked(str, lambda name: name in names, f"one of {', '.join(names)}")


def comma_list(parse_one: Parser) -> Callable[[str], list]:
    """Makes a function that reads a comma-separated list, without repetitions."""
    return lambda text: list(dict.fromkeys(parse_one(part.strip()) for part in text.split(",")))


def at_least(least: int) -> Parser:
    """Makes a function that reads a whole number with a lower bound."""
    return _checked(int, lambda n: n >= least, f"a whole number of at least {least}")


seed = _checked(int, lambda n: 0 <= n < 2**32, "a whole number in [0, 2^32)")
positive = _checked(float, lambda x: 0 < x < math.inf, "a positive number")
not_negative = _checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
share = _checked(float, lambda x: 0 <= x <= 1, "a number in [0, 1]")
positive_share = _checked(float, lambda x: 0 < x <= 1, "a share in (0, 1]")
sparsity = _checked(float, lambda s: 0 <= s < 1, "a sparsity in [0, 1)")


def command(module: str, description: str) -> argparse.ArgumentParser:
    """A parser without options.

    Args:
        module: the module that is run by `python -m`.
        description: one line for `--help`.
    """
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description)


@contextlib.contextmanager
def refusing(parser: argparse.ArgumentParser, out: Path) -> Iterator[None]:
    """Turns errors of what is done before an experiment into errors of its arguments.

    Args:
        parser: the parser, which prints one line and exits with 2.
        out: the folder of `--out`, which is made within.
    """
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {out} can't be written: {error.strerror}")


def option(
    parser: argparse.ArgumentParser,
    name: str,
    parse_one: Parser,
    default: Any,
    words: str = "",
    *,
    several: bool = False,
) -> None:
    """Adds an option with a default, which its help ends with.

    Args:
        parser: the parser.
        name: the option, such as `--repeats`.
        parse_one: reads its value.
        default: its default; a list where there may be several values.
        words: the help, without the default.
        several: whether it takes a comma-separated list.
    """
    shown = ",".join(map(str, default)) if several else default
    parser.add_argument(
        name,
        type=comma_list(parse_one) if several else parse_one,
        default=list(default) if several else default,
        metavar="A,B" if several else None,
        help="; ".join(part for part in (words, f"default: {shown}") if part),
    )


TARGETS = ("weights", "bytes", "flops", "loss", "accuracy")


def target(text: str) -> str:
    """Checks a target other than a sparsity, such as `flops:1e6` or `loss:0.05`."""
    name, _, number = text.partition(":")
    try:
        value = positive(number)
        one_of(TARGETS)(name)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(TARGETS)} with :X behind it, X a positive number"
        ) from None
    if name == "weights" and not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of weights")
    return text


def block_size(text: str) -> int | str | None:
    """Reads the `block_size` of `fishleg_jax.inverse.woodfisher`."""
    if text in ("none", "leaf"):
        return None if text == "none" else text
    return _checked(int, lambda n: n >= 1, "a whole number of at least 1, leaf or none")(text)


def by_name(names: Collection[str], parse_one: Parser) -> Callable[[str], dict]:
    """Makes a function that reads one value for all names, or `name=value` pairs with commas."""

    def parse_pairs(text: str) -> dict:
        if "=" not in text:
            return dict.fromkeys(names, parse_one(text))
        values = {}
        for pair in text.split(","):
            name, _, value = (part.strip() for part in pair.partition("="))
            if one_of(names)(name) in values:
                raise argparse.ArgumentTypeError(f"{name} is given twice in {text!r}")
            values[name] = parse_one(value)
        return values

    return parse_pairs


def pruning_parser(
    prog: str,
    description: str,
    *,
    methods: Collection[str],
    default: Sequence[str],
    several: bool = True,
    compensations: Sequence[str] = ("independent", "none"),
    models: Sequence[str] = CLASSIFIERS,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Sequence[int] = (0,),
    limited: bool = True,
    scratch: bool = False,
) -> argparse.ArgumentParser:
    """A parser with the options that all experiments have that prune one network.

    Args:
        prog: the name of the module.
        description: one line for `--help`.
        methods: the names of the methods.
        default: those that are used unless a user says otherwise.
        several: whether there may be more than one sparsity and seed.
        compensations: choices of `--compensation`.
        models: choices of `--model`; the first of a data set is its default.
        sparsities: those that are pruned to unless a user says otherwise, where there are several.
        seeds: likewise.
        limited: whether there is an `--examples`.
        scratch: whether `--epochs` may be 0, for random weights.

    Returns:
        The parser, for `parse`.
    """
    parser = command(prog, description)
    add = parser.add_argument
    parser.set_defaults(models=models)
    datasets = list(dict.fromkeys(MODELS[name].data for name in models))
    add("--dataset", choices=datasets, help="default: that of --model, else digits")
    add("--data-dir", type=Path, help="where TensorFlow Datasets has mnist or cifar10")
    add("--model", choices=models, help="default: the one that belongs to the data set")
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights; else it is trained")
    add("--epochs", type=at_least(0 if scratch else 1), help="of training, without --checkpoint")
    add(
        "--method",
        type=comma_list(one_of(methods)),
        default=list(default),
        metavar="A,B",
        help=f"of {', '.join(methods)}; default: {','.join(default)}",
    )
    if several:
        option(parser, "--sparsity", sparsity, sparsities, several=True)
        add(
            "--seed",
            "--seeds",
            type=comma_list(seed),
            default=list(seeds),
            metavar="A,B",
            help=f"default: {','.join(map(str, seeds))}",
        )
    else:
        add("--sparsity", type=sparsity, default=0.9, help="default: 0.9")
        add("--seed", type=seed, default=0, help="default: 0")
    add("--scope", choices=["global", "layer"], default="global", help="of the threshold")
    add("--compensation", choices=compensations, default=compensations[0])
    if limited:
        add("--examples", type=at_least(1), help="training images that the curvature may see")
    else:
        parser.set_defaults(examples=None)
    out = Path("results") / prog.rpartition(".")[2]
    add("--out", type=Path, default=out, help=f"default: {out}")
    return parser


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Adds options that bound the memory of an estimate, and change results by rounding alone."""
    add = parser.add_argument
    add(
        "--remat",
        type=at_least(1),
        metavar="SEGMENTS",
        help="derivatives keep what lies between SEGMENTS parts of the network, and make the "
        "activations inside anew (for a GPU or TPU; XLA for the CPU keeps them after all)",
    )
    add(
        "--examples-per-chunk",
        type=at_least(1),
        metavar="N",
        help="N examples of a batch are worked on at once; default: all of them",
    )


def memory_settings(args: argparse.Namespace) -> dict[str, int]:
    """The options of `add_memory_options` that were given, for the settings of a result."""
    given = {name: getattr(args, name, None) for name in ("remat", "examples_per_chunk")}
    return {name: value for name, value in given.items() if value is not None}


def _spec(args: argparse.Namespace) -> Spec:
    dataset = args.dataset or (MODELS[args.model].data if args.model else "digits")
    fitting = [name for name in args.models if MODELS[name].data == dataset]
    spec = MODELS[args.model or fitting[0]]
    if spec.name not in fitting:
        raise ValueError(
            f"--model {spec.name} is for {spec.data}, --dataset is {dataset}: use "
            f"{', '.join(fitting)}"
        )
    segments = memory_settings(args).get("remat")
    return spec._replace(model=flj.remat(spec.model, segments)) if segments else spec


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    check: Callable[[argparse.Namespace, Spec, datasets.Data], None] = lambda *_: None,
) -> tuple[argparse.Namespace, Spec, datasets.Data, Any]:
    """Reads and checks the arguments, and everything that they name.

    A bad one ends the program with one line on stderr and exit code 2; until all of them are found
    good nothing is written.  `--out` exists afterwards.

    Args:
        parser: see `pruning_parser`.
        argv: the arguments; None for those of the command line.
        check: raises a ValueError where they do not fit together.

    Returns:
        The arguments, the model, its data set, and the parameters and constants of `--checkpoint`
        or None.
    """
    args = parser.parse_args(argv)
    with refusing(parser, args.out):
        spec = _spec(args)
        if spec.data in ("digits", "faces") and args.data_dir is not None:
            raise ValueError(f"--data-dir is for mnist and cifar10, not for {spec.data}")
        loaded = checkpoints.load(args.checkpoint, spec) if args.checkpoint else None
        split = datasets.load(spec.dataset, args.data_dir)
        images = len(split.train[0])
        if args.examples is not None and args.examples > images:
            raise ValueError(f"--examples {args.examples}: {spec.dataset} has {images} to train on")
        if loaded is None or "steps" in args or getattr(args, "finetune", None):
            size = min(spec.train_batch, images)
            processes.check_dealt(size, f"training: {spec.name}'s batches of")
        check(args, spec, split)
        args.out.mkdir(parents=True, exist_ok=True)
    return args, spec, split, loaded
