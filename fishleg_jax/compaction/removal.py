"""Decides which units go: those that give out a constant, or meet zeros."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction.analysis import Analysis, Meeting
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.dependence import nonzero, varies
from fishleg_jax.compaction.folding import Alive, Changes, fold

Kept = list[dict[int, str]]  # for each coupling, units without weights that stay, with the reason


class Run(NamedTuple):
    """Run of a network on inputs of one size.

    Attributes:
        analysis: Its analysis.
        factors: The factor of each coupling.
    """

    analysis: Analysis
    factors: Sequence[Factor]

    def by_factor(self, alive: Sequence[np.ndarray]) -> Alive:
        """Units that stay, by factor in place of the coupling's number."""
        return dict(zip(self.factors, alive, strict=True))


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


def decide(runs: Sequence[Run], frozen: Mapping[int, str], multiple_of: int) -> Decision:
    """Decides on the units of every coupling.

    Args:
        runs: Analyses of the network with pruned weights at zero, on inputs of several sizes; a
            unit goes if it may in all.
        frozen: Couplings whose units all stay, by number, each with the reason.
        multiple_of: Numbers of units that stay are rounded up to multiples of this.

    Returns:
        A `Decision`.
    """
    kept: Kept = [{} for _ in runs[0].factors]
    numbers = {factor: i for run in runs for i, factor in enumerate(run.factors)}
    while True:
        alive = _removed_until_settled(runs, kept, frozen)
        changes, failures = fold([(run.analysis, run.by_factor(alive)) for run in runs])
        for factor, unit, reason in failures:
            kept[numbers[factor]].setdefault(unit, reason)
        if not failures and not _round_up(alive, kept, multiple_of):
            break
    return Decision(alive, [dict(sorted(x.items())) for x in kept], changes)


def check_settled(run: Run, longer: Run) -> None:
    """Raises a ValueError if more units depend on the inputs where loops take longer."""
    alive = [np.ones(factor.size, bool) for factor in run.factors]
    for one, other in zip(run.factors, longer.factors, strict=True):
        idle, still = (
            _idle(x.analysis.meetings, factor, x.by_factor(alive))
            for x, factor in ((run, one), (longer, other))
        )
        if (idle & ~still).any():
            raise ValueError(
                "inputs must be longer: units that do not depend on them here do so after twice "
                "as many steps; a sequence has to last until its first step has reached all units"
            )


def _removed_until_settled(runs: Sequence[Run], kept: Kept, frozen: Mapping) -> list[np.ndarray]:
    """Removes units until removals make no further ones possible."""
    alive = [np.ones(factor.size, bool) for factor in runs[0].factors]
    while True:
        before = [x.copy() for x in alive]
        for i, factor in enumerate(runs[0].factors):
            found = [_idle(x.analysis.meetings, x.factors[i], x.by_factor(alive)) for x in runs]
            idle = np.all(found, axis=0)
            # only couplings of the user have units whose order matters somewhere
            why = factor.mixed or (factor.pinned and f"their axis {factor.pinned}")
            if why is not None:
                why = f"{why}, so that a unit can't leave without changing the others"
            why = frozen.get(i, why)
            if why is not None:
                for unit in np.flatnonzero(idle).tolist():
                    kept[i].setdefault(unit, why)
            idle[list(kept[i])] = False
            alive[i] = ~idle
        if all((x == y).all() for x, y in zip(alive, before, strict=True)):
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


def _round_up(alive: Sequence[np.ndarray], kept: Kept, multiple_of: int) -> bool:
    """Keeps as many removed units as sizes need; returns whether there were any."""
    more = False
    for living, reasons in zip(alive, kept, strict=True):
        count = int(living.sum())
        wanted = min(max(-(-count // multiple_of), 1) * multiple_of, living.size)
        reason = "the size is rounded up" if multiple_of > 1 else "an axis needs one unit"
        for unit in np.flatnonzero(~living)[: wanted - count].tolist():
            reasons.setdefault(unit, reason)
            more = True
    return more
