"""Tables of `experiments.preconditioning`."""

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.report import tables

GAIN = 0.99  # of the lowering of the quadratic model's cost by all of a group update


def reached(row: dict, tolerance: float) -> tuple[float, float]:
    """The iterations and seconds until a relative residual, infinite where it is never reached.

    Args:
        row: an object of `results.json`.
        tolerance: the relative residual.
    """
    history = row["history"]
    for i, residual in enumerate(history["residual"]):
        if residual is not None and residual <= tolerance:
            return i, history["seconds"][i]
    return math.inf, math.inf


def gained(row: dict, lowest: float) -> float:
    """The iterations until most of the possible gain is made, infinite where it never is.

    Conjugate gradients lower the quadratic model in every step, whatever the preconditioner does to
    the residual; this is the gain that a pruning sees.

    Args:
        row: an object of `results.json`.
        lowest: the quadratic model's lowest rise of the loss on the same system.
    """
    begin = row["uncompensated_cost"]
    for i, cost in enumerate(row["history"]["cost"]):
        if cost is not None and cost <= begin - GAIN * (begin - lowest):
            return i
    return math.inf


def show(rows: Sequence[dict], tolerances: Sequence[float]) -> str:
    """A table for every system: medians over seeds, – if most seeds never get there.

    The gain is that of the lowest cost which any of the rows has for the same system and seed.

    Args:
        rows: the objects of a `results.json`.
        tolerances: the relative residuals to be reached.
    """
    names = ("model", "sparsity_target", "damping")
    shown = []
    for system in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        model, target, damping = system
        header = [f"{model}, {100 * target:g} % pruned, γ = {damping:g}", "fit"]
        header += [f"to {tolerance:g}" for tolerance in tolerances]
        header += [f"to {tolerance:g}, s" for tolerance in tolerances]
        header += [f"to {100 * GAIN:g} % gain", "fit, s", "iterations", "residual", "cost, %"]
        mine = [row for row in rows if tuple(row[name] for name in names) == system]
        lowest = {}
        for row in mine:
            known = lowest.get(row["seed"], math.inf)
            finite = [cost for cost in row["history"]["cost"] if cost is not None]
            lowest[row["seed"]] = min([known, *finite])
        cells = []
        for kind in dict.fromkeys(map(_kind, mine)):
            own = [row for row in mine if _kind(row) == kind]
            cells.append([kind[0], kind[1] or "–", *_cells(own, tolerances, lowest)])
        shown.append(tables.table(header, cells))
    return "\n\n".join(shown)


def _kind(row: dict) -> tuple[str, str | None]:
    return row["method"], row["fit"]


def _cells(
    own: Sequence[dict], tolerances: Sequence[float], lowest: Mapping[int, float]
) -> list[str]:
    def median(values, form):
        value = statistics.median(math.inf if v is None else v for v in values)
        return format(value, form) if math.isfinite(value) else "–"

    pairs = [[reached(row, tolerance) for row in own] for tolerance in tolerances]
    return [
        *(median([iterations for iterations, _ in column], "g") for column in pairs),
        *(median([seconds for _, seconds in column], ".2f") for column in pairs),
        median([gained(row, lowest[row["seed"]]) for row in own], "g"),
        median([row["fit_seconds"] for row in own], ".1f"),
        median([row["iterations"] for row in own], "g"),
        median([row["true_residual"] for row in own], ".1e"),
        median([100 * row["cost"] / row["uncompensated_cost"] for row in own], ".2f"),
    ]
