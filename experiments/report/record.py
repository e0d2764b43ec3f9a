"""Tables that are printed, and kept as data for the pages of docs/.

An experiment makes one `Table`, prints it, and with `--record NAME` writes it together with its
command, commit, date and machine to `docs/results/NAME.json`, from which `experiments.pages` makes
the page.
"""

import argparse
import datetime
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import pages
from experiments.report import tables
from experiments.running import files

Cell = None | str | float | list[float]  # a list holds a median, the least and the largest value


class Table(NamedTuple):
    """A table and how it came about.

    Attributes:
        title: one line.
        columns: their titles; the first one is that of the names of rows.
        rows: cells, as many in each row as there are columns.
        decimals: decimals of the numbers in each column.
        seed: the seeds, as text.
        data: the data and the network.
        examples: training and test examples, and what they were for.
        note: what else a reader must know; "" for nothing.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    decimals: list[int]
    seed: str
    data: str
    examples: str
    note: str = ""

    def __str__(self) -> str:
        """The table as plain text."""
        cells = [
            [pages.cell(x, digits) or "–" for x, digits in zip(row, self.decimals, strict=True)]
            for row in self.rows
        ]
        return tables.table(self.columns, cells)


def spread(values: Sequence[float | None]) -> Cell:
    """The median, with the least and the largest value where they differ; None for no value.

    Args:
        values: the values; None and NaN are left out.
    """
    numbers = tables.middle_and_ends(values)
    if numbers is None:
        return None
    middle, low, high = numbers
    return middle if low == high else [middle, low, high]


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--record NAME` to a parser, and notes the commit before anybody changes it."""
    commit(pages.ROOT)  # the argument of `keep`, or the cache would not know it
    parser.add_argument(
        "--record", metavar="NAME", help="write the table to docs/results/NAME.json"
    )


@functools.cache
def commit(root: Path = pages.ROOT) -> str:
    """The short hash of the checkout, with `+` where files differ from it; "unknown" without git.

    Args:
        root: folder of the repository.
    """
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+" if changes.stdout.strip() else "")


def command(module: str, argv: Sequence[str] | None) -> str:
    """The command line that ran, without `--record` and `--out`, which change no figure.

    Args:
        module: the module that is run by `python -m`.
        argv: its arguments; None for those of the process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for i in range(len(given) - 1, -1, -1):
        if given[i] in ("--record", "--out"):
            del given[i : i + 2]
    return shlex.join(["python", "-m", module, *given])


def _rounded(value: Cell, digits: int) -> Cell:
    """A cell with the decimals that the page shows."""
    if isinstance(value, list):
        return [round(x, digits) for x in value]
    return round(value, digits) if isinstance(value, float) else value


def keep(
    name: str | None,
    table: Table,
    module: str,
    argv: Sequence[str] | None,
    root: Path = pages.ROOT,
) -> None:
    """Writes a table to `docs/results/`.

    Args:
        name: of the table; None to do nothing.
        table: the table.
        module: the module that is run by `python -m`.
        argv: its arguments; None for those of the process.
        root: folder of the repository.
    """
    if name is None:
        return
    made: dict[str, Any] = {
        "title": table.title,
        "command": [command(module, argv)],
        "seed": table.seed,
        "data": table.data,
        "examples": table.examples,
        "commit": commit(root),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
        "note": table.note,
        "columns": table.columns,
        "decimals": [None, *table.decimals[1:]],
        "rows": [
            [_rounded(x, digits) for x, digits in zip(row, table.decimals, strict=True)]
            for row in table.rows
        ],
    }
    print(files.write_json(root / "docs" / "results" / f"{name}.json", made))
