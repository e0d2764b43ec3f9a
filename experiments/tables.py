"""Plain text tables."""

import statistics
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines up cells: the first column to the left, all others to the right.

    Args:
        header: the names of the columns.
        rows: the cells, as many in each row as there are columns.

    Returns:
        The table, with a rule under its header.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    texts = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])


def select(results: Sequence[dict], field: str, **fields) -> list:
    """A field of those results whose other fields have the values given.

    Args:
        results: the objects of a `results.json`.
        field: the field wanted.
        fields: what the other fields have to be.
    """
    return [
        result[field]
        for result in results
        if all(result[name] == value for name, value in fields.items())
    ]


def accuracies(results: Sequence[dict]) -> str:
    """A table of test accuracies in percent: a row per method, a column per sparsity.

    Args:
        results: the objects of a `results.json` for one model; over seeds the median is shown.

    Returns:
        The table, with the dense accuracy as its first row.
    """
    methods = list(dict.fromkeys(result["method"] for result in results))
    targets = sorted({result["sparsity_target"] for result in results})
    header = ["test accuracy, %", *(f"{100 * target:g} %" for target in targets)]
    dense = statistics.median(select(results, "dense_accuracy"))
    rows = [["dense", *[f"{dense:.2f}"] * len(targets)]]
    for method in methods:
        found = [select(results, "accuracy", method=method, sparsity_target=t) for t in targets]
        rows.append([method, *(f"{statistics.median(values):.2f}" for values in found)])
    return table(header, rows)
