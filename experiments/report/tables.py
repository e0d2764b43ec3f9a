"""Plain text tables."""

import math
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tabulate

tabulate.MIN_PADDING = 0  # or columns would be two wider than their titles
RECALIBRATED = "recalibrated_on"  # the number of images on which batch norm was recomputed


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines up cells: the first column to the left, all others to the right.

    Args:
        header: the names of the columns.
        rows: the cells, as many in each row as there are columns.

    Returns:
        The table, with a rule under its header.
    """
    right = ["right"] * (len(header) - 1)
    text = tabulate.tabulate(
        [list(row) for row in rows],
        headers=list(header),
        tablefmt="simple",
        disable_numparse=True,
        colalign=("left", *right) if rows else None,
    )
    return "\n".join(line.rstrip() for line in text.split("\n"))


class _Cells(string.Formatter):
    def format_field(self, value: Any, form: str) -> str:
        return "–" if value is None else super().format_field(value, form)


def of_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table with a row for each object, such as those of a JSON file.

    Args:
        rows: the objects.
        columns: the format of each column by its title, such as `{seconds:.2f}`; the fields of an
            object stand in it, and – in place of None.

    Returns:
        The table.
    """
    return table(list(columns), cells(rows, columns))


def cells(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """The cells of `of_rows`, row by row."""
    return [[_Cells().vformat(form, (), row) for form in columns.values()] for row in rows]


def select(results: Sequence[dict], field: str, **fields) -> list:
    """A field of those results whose other fields have the values given.

    Args:
        results: the objects of a `results.json`.
        field: the field wanted; None of those that do not have it.
        fields: values that the other fields must have.
    """
    return [
        result.get(field)
        for result in results
        if all(result[name] == value for name, value in fields.items())
    ]


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """The median, and the least and the largest value where they differ; – for no value.

    Args:
        values: the values; None and NaN are left out.
        digits: digits after the point.
    """
    numbers = middle_and_ends(values)
    if numbers is None:
        return "–"
    middle, low, high = (f"{number:.{digits}f}" for number in numbers)
    return middle if low == high else f"{middle} ({low}–{high})"


def middle_and_ends(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """The median, the least and the largest of some values; None without any.

    Args:
        values: the values; None and NaN are left out.
    """
    sound = [value for value in values if value is not None and math.isfinite(value)]
    return (statistics.median(sound), min(sound), max(sound)) if sound else None


def by_sparsity(
    results: Sequence[dict],
    field: str,
    title: str,
    show: Callable[[Sequence], str],
    further: Mapping[str, Callable[[Sequence[dict]], str]] = {},
) -> str:
    """A table of one field: a row per method, a column per sparsity.

    Args:
        results: the objects of a `results.json` for one model.
        field: the field; where there is its `dense_` counterpart, that is the first row.
        title: the title of the first column.
        show: makes a cell of its values over seeds.
        further: further columns by title: each makes a cell from the results of a method.

    Returns:
        The table.
    """
    columns, values = at_sparsities(results, field)
    rows = []
    for name, cells in values.items():
        own = [result for result in results if result["method"] == name]
        more = [make(own) if own else "" for make in further.values()]
        rows.append([name, *map(show, cells), *more])
    return table([title, *columns, *further], rows)


def at_sparsities(
    results: Sequence[dict], field: str
) -> tuple[list[str], dict[str, list[list[float | None]]]]:
    """Values of one field over seeds, by method and sparsity.

    Args:
        results: the objects of a `results.json` for one model.
        field: the field.

    Returns:
        The titles of the columns, one for each sparsity; and for each method a list of values for
        each of them.  Where there is the field's `dense_` counterpart, `dense` is the first.
    """
    targets = sorted({result["sparsity_target"] for result in results}, key=_order)
    found = {}
    if f"dense_{field}" in results[0]:
        # one value a seed, however many results it has
        dense = {result["seed"]: result[f"dense_{field}"] for result in results}
        found["dense"] = [list(dense.values())] * len(targets)
    for method in dict.fromkeys(result["method"] for result in results):
        found[method] = [select(results, field, method=method, sparsity_target=t) for t in targets]
    return list(map(_name, targets)), found


def _order(target: float | str) -> tuple:
    return (1, 0.0, target) if isinstance(target, str) else (0, target, "")


def _name(target: float | str) -> str:
    return target if isinstance(target, str) else f"{100 * target:g} %"


def measurements(results: Sequence[dict]) -> dict[str, str]:
    """Prefixes of the accuracy and loss fields in some results, and words for each in a title.

    Args:
        results: the objects of a `results.json`; those of networks with batch norm have two.
    """
    sizes = {result[RECALIBRATED] for result in results if RECALIBRATED in result}
    if not sizes:
        return {"": ""}
    images = ", ".join(map(str, sorted(sizes)))
    return {
        "": "batch norm as stored: ",
        "recalibrated_": f"batch norm recomputed on {images} training images: ",
    }


def accuracies(results: Sequence[dict]) -> str:
    """Tables of test accuracies in percent: a row per method, a column per sparsity.

    Args:
        results: the objects of a `results.json` for one model; over seeds the median is shown.
    """

    def median(values):
        return f"{statistics.median(values):.2f}"

    return "\n\n".join(
        by_sparsity(results, f"{prefix}accuracy", f"{title}test accuracy, %", median)
        for prefix, title in measurements(results).items()
    )
