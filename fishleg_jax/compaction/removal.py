"""Decides which units go: those that give out a constant, or meet zeros."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction.analysis import Analysis, Meeting
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.dependence import nonzero, varies
from fishleg_jax.compaction.folding import Changes, fold

Alive = dict[Factor, np.ndarray]


class Decision(NamedTuple):
    """Units that stay, and changes of leaves that make up for the others.

    Attributes:
        alive: Booleans over the units of each coupling.
        reasons: Reason why a unit without weights stays, by coupling and unit.
        changes: Arrays to add to leaves, by key path.
    """

    alive: list[np.ndarray]
    reasons: list[dict[int, str]]
    changes: Changes


def decide(analysis: Analysis, couplings: Sequence, factors: Sequence[Factor], multiple_of: int):
    """Decides on the units of every coupling.

    Args:
        analysis: The network with pruned weights at zero.
        couplings: Tuples of members.
        factors: Factor of each coupling.
        multiple_of: Numbers of units that stay are rounded up to multiples of this.

    Returns:
        A `Decision`.
    """
    kept: dict[Factor, dict[int, str]] = {factor: {} for factor in factors}
    while True:
        alive = _removed_until_settled(analysis, factors, kept)
        changes, failures = fold(analysis, alive)
        for factor, unit, reason in failures:
            kept[factor].setdefault(unit, reason)
        if not failures and not _round_up(alive, kept, multiple_of):
            break
    return Decision(
        [alive[f] for f in factors], [dict(sorted(kept[f].items())) for f in factors], changes
    )


def _removed_until_settled(analysis: Analysis, factors: Sequence[Factor], kept: dict) -> Alive:
    """Removes units until removals make no further ones possible."""
    alive = {factor: np.ones(factor.size, bool) for factor in factors}
    while True:
        before = {factor: x.copy() for factor, x in alive.items()}
        for factor in factors:
            idle = _idle(analysis.meetings, factor, alive)
            # only couplings of the user have units whose order matters somewhere
            why = factor.mixed or (factor.pinned and f"their axis {factor.pinned}")
            if why is not None:
                reason = f"{why}, so that a unit can't leave without changing the others"
                for unit in np.flatnonzero(idle).tolist():
                    kept[factor].setdefault(unit, reason)
            idle[list(kept[factor])] = False
            alive[factor] = ~idle
        if all((alive[f] == before[f]).all() for f in factors):
            return alive


def _idle(meetings: Sequence[Meeting], factor: Factor, alive: Alive) -> np.ndarray:
    """Units that are constant or meet zeros wherever they are summed over."""
    found = [_idle_in(x, factor, alive) for x in meetings if factor in x.factors]
    return np.all(found, axis=0) if found else np.zeros(factor.size, bool)


def _idle_in(meeting: Meeting, factor: Factor, alive: Alive) -> np.ndarray:
    sides = meeting.sides()
    if sides is None:
        pairs = zip(meeting.step.operands, (meeting.left, meeting.right), strict=True)
        return np.any(
            [~_any_by_unit(nonzero(value), value.axes, factor, along) for value, along in pairs],
            axis=0,
        )
    (data, data_along), (weights, along) = sides
    varying = _any_by_unit(varies(data), data.axes, factor, data_along)
    free = [i for i in range(len(weights.shape)) if i not in along]
    living = nonzero(weights) & _axes.alive_entries(weights.shape, weights.axes, alive, free)
    return ~varying | ~_any_by_unit(living, weights.axes, factor, along)


def _any_by_unit(marked: np.ndarray, axes: Sequence, factor: Factor, along: Sequence[int]):
    """Whether anything is marked in each unit of a factor."""
    found = [x.any(axis=1) for x in _axes.by_unit(marked, axes, factor, along)]
    return np.any(found, axis=0)


def _round_up(alive: Alive, kept: dict, multiple_of: int) -> bool:
    """Keeps as many removed units as sizes need; returns whether there were any."""
    more = False
    for factor, living in alive.items():
        count = int(living.sum())
        wanted = min(max(-(-count // multiple_of), 1) * multiple_of, factor.size)
        reason = "the size is rounded up" if multiple_of > 1 else "an axis needs one unit"
        for unit in np.flatnonzero(~living)[: wanted - count].tolist():
            kept[factor].setdefault(unit, reason)
            more = True
    return more
