"""Writes the tables of README.md and docs/ from the data in docs/results/.

    python -m experiments.pages
    python -m experiments.pages --check

A page marks the place of a table by `<!-- table: NAME -->` and `<!-- end -->`; between the two
stands what `docs/results/NAME.json` gives: the rows, and the line that says how they were measured.
`--check` writes nothing and fails where a page differs from its data.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
# every table has these; a summary, whose cells refer to other tables, has the last two only
FIELDS = ("title", "command", "seed", "data", "examples", "commit", "date", "machine")
BODY = ("columns", "rows")


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files that may hold tables.

    Args:
        root: folder of the repository.

    Returns:
        README.md and every page below docs/, sorted.
    """
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def read(name: str, root: Path = ROOT) -> dict[str, Any]:
    """Reads the data of one table.

    Args:
        name: name of the table, that of its file without `.json`.
        root: folder of the repository.

    Returns:
        The fields of the file.

    Raises:
        ValueError: there is no such file, a field is missing, or a row has another length than the
            columns.
    """
    path = root / "docs" / "results" / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"table {name!r} has no data: {path} does not exist")
    table = json.loads(path.read_text(encoding="utf-8"))
    needed = BODY if table.get("summary") else (*FIELDS, *BODY)
    missing = [x for x in needed if not table.get(x)]
    if missing:
        raise ValueError(f"{path.name} must have {', '.join(missing)}")
    for row in table["rows"]:
        if len(row) != len(table["columns"]):
            raise ValueError(
                f"{path.name}: row {row[0]!r} has {len(row)} cells for "
                f"{len(table['columns'])} columns"
            )
    return table


def cell(value: Any, decimals: int | None, root: Path = ROOT) -> str:
    """One cell as text: a number, a median with its range, a text, a reference or nothing."""
    if value is None:
        return ""
    if isinstance(value, dict):  # another table's cell, so that a figure is kept once
        return _referred(value, root)
    if isinstance(value, list):
        median, low, high = (cell(x, decimals, root) for x in value)
        return f"{median} ({low}–{high})"
    if isinstance(value, str):
        return value
    return str(value) if decimals is None else f"{value:.{decimals}f}"


def _referred(reference: dict[str, str], root: Path) -> str:
    """The text of the cell that `{"table": ..., "row": ..., "column": ...}` names."""
    table = read(reference["table"], root)
    column = table["columns"].index(reference["column"])
    rows = [row for row in table["rows"] if row[0] == reference["row"]]
    if len(rows) != 1:
        raise ValueError(f"{reference['table']} must have one row {reference['row']!r}")
    return cell(rows[0][column], _decimals(table, column), root)


def _decimals(table: dict[str, Any], column: int) -> int | None:
    """Decimals of the numbers in one column; None for as many as the number has."""
    return table.get("decimals", [None] * len(table["columns"]))[column]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _provenance(table: dict[str, Any]) -> list[str]:
    """How a table was measured: its command, and one paragraph."""
    seed = table["seed"]
    parts = [
        "" if seed == "none" else f"Seed {seed}.",
        f"Data: {table['data']}.",
        "" if table["examples"] == "none" else f"Examples: {table['examples']}.",
        f"Commit `{table['commit']}`, {table['date']}; {table['machine']}.",
        table.get("note", ""),
    ]
    return ["", "```sh", *table["command"], "```", "", " ".join(x for x in parts if x)]


def render(name: str, root: Path = ROOT) -> str:
    """Renders one table as Markdown.

    Args:
        name: name of the table.
        root: folder of the repository.

    Returns:
        Everything between and including the markers.

    Raises:
        ValueError: unsound data, see `read`.

    Example:
        >>> print(render("selection_swaps").splitlines()[2])
        | | 80 % | 90 % |
    """
    table = read(name, root)
    lines = [_line(table["columns"]).replace("|  |", "| |"), "|" + "---|" * len(table["columns"])]
    for row in table["rows"]:
        cells = [cell(x, _decimals(table, i), root) for i, x in enumerate(row)]
        lines.append(re.sub(r"\|  (?=\|)", "| ", _line(cells)))
    if not table.get("summary"):
        lines += _provenance(table)
    # blank lines, without which Markdown reads the rows as part of the marker
    return "\n".join([f"<!-- table: {name} -->", "", *lines, "", "<!-- end -->"])


def rendered(text: str, root: Path = ROOT) -> str:
    """A page's text with all of its tables made from the data.

    Args:
        text: Markdown with markers.
        root: folder of the repository.

    Returns:
        The text as it should be.

    Raises:
        ValueError: a marker without an end, or unsound data, see `read`.
    """
    marked = text.count("<!-- table:")
    if len(BLOCK.findall(text)) != marked or text.count("<!-- end -->") != marked:
        raise ValueError("every <!-- table: NAME --> must be followed by one <!-- end -->")
    return BLOCK.sub(lambda match: render(match[1], root), text)


def stale(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Pages that differ from their data.

    Args:
        root: folder of the repository.

    Yields:
        The page, and its text as it should be.
    """
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        try:
            wanted = rendered(text, root)
        except ValueError as error:
            raise ValueError(f"{page.relative_to(root)}: {error}") from error
        if wanted != text:
            yield page, wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the tables.

    Args:
        argv: command line; None for that of the process.

    Returns:
        Exit status: 1 where `--check` finds a page that differs from its data.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pages", description="Write the tables of README.md and docs/."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where one differs"
    )
    args = parser.parse_args(argv)
    found = list(stale())
    for page, text in found:
        print(f"{'differs from its data' if args.check else 'written'}: {page.relative_to(ROOT)}")
        if not args.check:
            page.write_text(text, encoding="utf-8")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
