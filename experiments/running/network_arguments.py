"""The arguments of experiments that go through several networks."""

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from experiments.models import cases
from experiments.running.arguments import comma_list, command, one_of


def make_parser(
    prog: str,
    description: str,
    names: Collection[str],
    *,
    option: str = "--model",
    default: Sequence[str] | None = None,
) -> argparse.ArgumentParser:
    """A parser with the options that all experiments have that go through several networks.

    Args:
        prog: the name of the module.
        description: one line for `--help`.
        names: those of the models.
        option: the option that chooses among them; `parse` returns it as `model`.
        default: those that are used unless a user says otherwise; None for all.

    Returns:
        The parser, for `parse`.
    """
    parser = command(prog, description)
    parser.add_argument(
        option,
        dest="model",
        type=comma_list(one_of(names)),
        default=list(names if default is None else default),
        metavar="A,B",
        help=f"of {', '.join(names)}; default: {'all' if default is None else ','.join(default)}",
    )
    parser.add_argument(
        "--data-dir", type=Path, help="where TensorFlow Datasets has mnist and cifar10"
    )
    return parser


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    check: Callable[[argparse.Namespace], None] = lambda _: None,
) -> argparse.Namespace:
    """Reads and checks the arguments, and whether data and checkpoints of all networks are there.

    A bad one ends the program with one line on stderr and exit code 2.

    Args:
        parser: see `make_parser`.
        argv: the arguments; None for those of the command line.
        check: raises a ValueError where they do not fit together.
    """
    args = parser.parse_args(argv)
    try:
        for name in args.model:
            cases.check(name, args.data_dir)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args
