"""Accuracy of each method against its damping, with magnitude as the limit.

As γ grows every `F̂_γ⁻¹` comes near to `I/γ`, with which Optimal Brain Surgeon prunes by magnitude
and leaves the kept weights alone; as γ falls each depends on its curvature alone.

States have the damping beside the data, so one fit serves all dampings, but for WoodFisher's square
roots, which begin with it and are fitted anew.  FishLeg has learned its coordinates at its own
damping; they are relative to its frames and stay as they are, so that away from that damping it is
what its start would be there, and its limit is magnitude but for a few per cent of the scores.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from experiments.estimates import dampings
from experiments.models import training
from experiments.quadratic import pruning
from experiments.quadratic.pruning import Case, Fitted
from experiments.report import record


def at_damping(method: str, case: Case, estimate: Fitted, damping: float) -> Fitted:
    """A fitted method at another damping, fitted anew if the damping is part of its fit.

    Args:
        method: its name.
        case: the network and its data.
        estimate: the method fitted at some damping.
        damping: γ.
    """
    state = dampings.with_damping(estimate.state, damping)
    return (
        pruning.fitted(method, case, damping) if state is None else estimate._replace(state=state)
    )


def sweep(
    method: str, case: Case, estimate: Fitted, values: Sequence[float]
) -> list[dict[str, Any]]:
    """Prunes a network with one method at many dampings.

    Args:
        method: its name.
        case: the network and its data.
        estimate: the method fitted at its own damping.
        values: the values of γ.

    Returns:
        The objects of `damping.json`, one for each damping; one in all, of damping None, for a
        method without damping.  Where the estimate is not finite the accuracy and loss are NaN.
    """
    damped = hasattr(estimate.state, "damping")
    rows = []
    for damping in tqdm(values if damped else [None], desc=f"damping, {method}", disable=None):
        begin = time.perf_counter()
        if damped:
            estimate = at_damping(method, case, estimate, damping)
        try:
            params = pruning.prune(case, estimate).params
        except FloatingPointError:  # at the smallest dampings: that is worth showing
            accuracy = loss = float("nan")
        else:
            constants = case.dense.constants
            accuracy, loss = training.evaluate(case.spec.model, params, case.test, constants)
        rows.append(
            {
                "method": method,
                "damping": damping,
                "accuracy": accuracy,
                "loss": loss,
                "seconds": time.perf_counter() - begin,
                **pruning.fields(case),
            }
        )
    return rows


def table(rows: Sequence[dict], values: Sequence[float], case: Case) -> record.Table:
    """The accuracies: a row for every method, a column for every damping.

    Args:
        rows: the objects of `damping.json`.
        values: the values of γ.
        case: what was pruned.
    """
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["damping"]: row["accuracy"] for row in rows if row["method"] == method}
        own = [found.get(d, found.get(None)) for d in values]
        cells.append([method, *("not finite" if math.isnan(x) else x for x in own)])
    seen = f"{len(case.curvature[0]):,} training examples for the curvature"
    return record.Table(
        title=f"{case.spec.name}: test accuracy in % at {100 * case.args.sparsity:g} %, by damping",
        columns=["", *(f"{d:.0e}" for d in values)],
        rows=cells,
        decimals=[0, *[2] * len(values)],
        seed=str(case.args.seed),
        data=case.spec.dataset,
        examples=f"{seen}; {len(case.test[0]):,} test examples",
    )
