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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import pages
from experiments.report import tables
from experiments.running import files, processes

MEDIANS = "The median over seeds, with the least and the largest"  # what `spread` shows

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


def seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """The seeds of some results, each once, as text.

    Args:
        rows: objects of a `results.json`.
    """
    return ", ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in rows))


def at_sparsities(
    rows: Sequence[dict], field: str, title: str, *, examples: str, digits: int = 2
) -> Table:
    """A table of one field: a row per method, a column per sparsity; medians and ranges over seeds.

    Args:
        rows: the objects of a `results.json` for one model.
        field: the field.
        title: its name and unit.
        examples: training and test examples, and what they were for.
        digits: decimals.
    """
    columns, values = tables.at_sparsities(rows, field)
    first = rows[0]
    return Table(
        title=f"{first['model']}: {title}",
        columns=["", *columns],
        rows=[[name, *map(spread, cells)] for name, cells in values.items()],
        decimals=[0, *[digits] * len(columns)],
        seed=seeds(rows),
        data=first["dataset"],
        examples=examples,
        note=f"{MEDIANS}.",
    )


def of_rows(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], **about: str
) -> Table:
    """A table with a row for each object, whose cells are text.

    Args:
        title: one line.
        rows: the objects.
        columns: the format of each column by its title, see `tables.of_rows`.
        **about: `seed`, `data`, `examples` and `note` of the table.
    """
    return Table(title, list(columns), tables.cells(rows, columns), [0] * len(columns), **about)


def keep_accuracies(
    name: str | None,
    rows: Sequence[dict],
    module: str,
    argv: Sequence[str] | None,
    test: int,
    root: Path = pages.ROOT,
) -> None:
    """Writes the accuracies of a `results.json`; those with batch norm recomputed to a second file.

    Args:
        name: of the table; None to do nothing.
        rows: the objects of a `results.json` for one model.
        module: the module that is run by `python -m`.
        argv: its arguments; None for those of the process.
        test: number of test examples.
        root: folder of the repository.
    """
    train = max(row["curvature_examples"] for row in rows)
    examples = f"{train:,} training examples for every method but magnitude; {test:,} test examples"
    for prefix, title in tables.measurements(rows).items():
        suffix = f"_{prefix}".rstrip("_")
        field, title = f"{prefix}accuracy", f"{title}test accuracy, %"
        table = at_sparsities(rows, field, title, examples=examples)
        keep(name and name + suffix, table, module, argv, root)


def stacked(parts: Mapping[str, Table], title: str) -> Table:
    """One table of several with the same columns, such as those of networks.

    Args:
        parts: the tables by the name that goes before the names of their rows.
        title: of the whole.

    Returns:
        The table; seeds, data, examples and notes are those of the parts, each once.
    """
    first = next(iter(parts.values()))
    rows = [[f"{name}: {row[0]}", *row[1:]] for name, part in parts.items() for row in part.rows]

    def once(field: str) -> str:
        return "; ".join(dict.fromkeys(filter(None, (getattr(x, field) for x in parts.values()))))

    fields = {field: once(field) for field in ("seed", "data", "examples", "note")}
    return first._replace(title=title, rows=rows, **fields)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--record NAME` to a parser, and notes the commit before anybody changes it."""
    commit(pages.ROOT)  # the argument of `keep`, or the cache would not know it
    parser.add_argument(
        "--record", metavar="NAME", help="write the table to docs/results/NAME.json"
    )


@functools.cache
def commit(root: Path = pages.ROOT) -> str:
    """The short hash of the checkout, with `+` where files differ from it; "unknown" without git.

    Tables that were recorded before, and pages, make no difference.

    Args:
        root: folder of the repository.
    """
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"],
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


def _machine() -> str:
    """The CPU cores that this process may use, of those there are."""
    there, own = os.cpu_count(), processes.cores()
    return f"{there} CPU cores" + ("" if own == there else f", {own} of them for this command")


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
        "machine": _machine(),
        "note": table.note,
        "columns": table.columns,
        "decimals": [None, *table.decimals[1:]],
        "rows": [
            [_rounded(x, digits) for x, digits in zip(row, table.decimals, strict=True)]
            for row in table.rows
        ],
    }
    print(files.write_json(root / "docs" / "results" / f"{name}.json", made))
