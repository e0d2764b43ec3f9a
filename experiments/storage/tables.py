"""Tables of accuracies, of the cells that they need, and of codings."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.models.specs import MODELS
from experiments.report import record
from experiments.storage import measuring

WITHIN = (0.5, 1.0, 2.0)  # points below the accuracy without noise
BITS = 8
EACH_CODING = 4.0  # cells for each weight where codings are compared
ALL_CELLS = (
    "all cells, those of signs, positions of zeros, ranges and numbers of cells among them, over "
    "the weights of the dense network"
)


def interval(values: Sequence[float]) -> str:
    """A mean with 1.96 standard errors, such as `97.1 ± 0.2`."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.2f}"


def _own(rows: Sequence[Mapping[str, Any]], **fields: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _accuracies(rows: Sequence[Mapping[str, Any]], **fields: Any) -> list[float]:
    return [x for row in _own(rows, **fields) for x in row["accuracies"]]


def _cells(rows: Sequence[Mapping[str, Any]], weights: int, **fields: Any) -> float:
    """All cells over the number of weights of the dense network, a mean over seeds."""
    return float(np.mean([row["total_cells"] for row in _own(rows, **fields)])) / weights


def _cell(rows: Sequence[Mapping[str, Any]], weights: int, **fields: Any) -> str | None:
    """Accuracy with its interval, and all cells in parentheses; None without such rows."""
    accuracies = _accuracies(rows, **fields)
    if not accuracies:
        return None
    return f"{interval(accuracies)} ({_cells(rows, weights, **fields):.2f})"


def _kinds(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    pairs = ((r["network"], r["allotment"]) for r in rows if r["allotment"] != "digital")
    return list(dict.fromkeys(pairs))


def show(rows: Sequence[Mapping[str, Any]], weights: int) -> record.Table:
    """A row for each number of cells, columns for networks and allotments.

    Args:
        rows: objects of `results.json`, for one kind of cell.
        weights: number of weights of the dense network.
    """
    cell = partial(_cell, rows, weights)
    kinds = _kinds(rows)
    lines: list[list[record.Cell]] = []
    for each in sorted({row["each"] for row in rows if row["allotment"] != "digital"}):
        cells = [cell(network=n, allotment=a, each=each) for n, a in kinds]
        lines.append([f"{each:g} for a stored weight", *cells])
    cells = [
        cell(network=n, allotment="digital") if a == measuring.ALLOTMENTS[0] else None
        for n, a in kinds
    ]
    lines.append([f"{BITS} bits, digital", *cells])
    return _made(rows, "test accuracy, %", ["cells", *(f"{n}, {a}" for n, a in kinds)], lines)


def _made(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    columns: list[str],
    lines: list[list[record.Cell]],
) -> record.Table:
    """A table of one network in one kind of cell."""
    settings, spec = rows[0]["settings"], MODELS[rows[0]["model"]]
    return record.Table(
        title=f"{spec.name} in noisy cells: {title}",
        columns=columns,
        rows=lines,
        decimals=[0, *[2] * (len(columns) - 1)],
        seed=record.seeds(rows),
        data=f"{spec.dataset}; pruned: {settings['sparsity']:.0%} by FishLeg's default call, with "
        f"at most {settings['most_stages']} stages",
        examples=f"{settings['examples']:,} training examples for the {settings['curvature']} "
        "weights' curvature; at most "
        f"{settings['test']:,} test examples",
        note=f"Means over {settings['draws']} draws of the noise for each seed, ± 1.96 standard "
        f"errors. In parentheses {ALL_CELLS}.",
    )


def ratios(rows: Sequence[Mapping[str, Any]], weights: int) -> list[dict[str, Any]]:
    """All cells that are needed by curvature over equal ones, for networks and accuracies.

    Args:
        rows: objects of `results.json`, for one kind of cell.
        weights: number of weights of the dense network.
    """
    found = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name and row["allotment"] != "digital"]
        each = sorted({row["each"] for row in own})
        equal, *others = [
            measuring.Curve(
                [_cells(own, weights, allotment=allotment, each=n) for n in each],
                np.array([_accuracies(own, allotment=allotment, each=n) for n in each]),
            )
            for allotment in measuring.ALLOTMENTS
        ]
        exact = np.mean([row["exact"] for row in own])
        for points in WITHIN:
            all_of_them = {
                allotment: measuring.ratio(curve, equal, exact - points)
                for allotment, curve in zip(measuring.SHARED, others, strict=True)
            }
            found.append({"network": name, "points": points, **all_of_them})
    return found


def needed(rows: Sequence[Mapping[str, Any]], weights: int) -> record.Table:
    """Cells needed for an accuracy, equal ones and by curvature, and their ratio with its interval.

    Args:
        rows: objects of `results.json`, for one kind of cell.
        weights: number of weights of the dense network.
    """
    lines: list[list[record.Cell]] = []
    for one in ratios(rows, weights):
        ways = [one[allotment] for allotment in measuring.SHARED]
        line = [f"{one['network']}, {one['points']:g} points below", ways[0]["theirs"]]
        line += [way["ours"] for way in ways]
        for way in ways:
            span = [way["ratio"], way["low"], way["high"]]
            line.append(way["ratio"] if None in span else span)  # not reached in some draws, or all
        lines.append(line)
    title = "cells to come near the accuracy without noise"
    columns = ["", *measuring.ALLOTMENTS, *(f"ratio, {name}" for name in measuring.SHARED)]
    return _made(rows, title, columns, lines)._replace(
        note=f"Numbers are {ALL_CELLS}, interpolated between those that were tried; ratios to "
        "equal ones have the interval of a bootstrap over draws. 1.00: one cell for a stored "
        "weight, the fewest, is enough both ways."
    )


def codings(rows: Sequence[Mapping[str, Any]], weights: int) -> record.Table:
    """Accuracies of the codings with as many cells for each weight that takes any.

    Args:
        rows: objects of `results.json`, for one kind of cell.
        weights: number of weights of the dense network.
    """
    own = [row for row in rows if row["each"] == EACH_CODING and row["coding"] is not None]
    kinds = _kinds(own)
    lines: list[list[record.Cell]] = []
    for coding in dict.fromkeys(row["coding"] for row in own):
        cell = partial(_cell, own, weights, coding=coding)
        lines.append([coding, *(cell(network=n, allotment=a) for n, a in kinds)])
    title = f"codings, {EACH_CODING:g} cells for a stored weight"
    return _made(own, title, ["", *(f"{n}, {a}" for n, a in kinds)], lines)


def plain(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of the default coding, and of digital storage."""
    return [row for row in rows if row["coding"] in (next(iter(measuring.CODINGS)), None)]
