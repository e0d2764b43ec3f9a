"""Folds the constants of removed units into biases and means.

A removed unit that gave out a constant leaves a gap in every sum that took it in.  The gap is
followed through the operations behind the sum until a leaf is added (a bias) or subtracted (the
mean of a batch norm) that can take it up exactly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction.analysis import Analysis, Meeting
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.dependence import MOVES, nonzero
from fishleg_jax.compaction.tape import SAME, Step, Value

Alive = dict[Factor, np.ndarray]
Changes = dict[str, np.ndarray]
Failures = list[tuple[Factor, int, str]]
EXACT = 1e-5  # relative difference between gaps that are the same but for rounding

UNEVEN = (
    "it gives out a constant whose effect differs between places or steps (as at the borders of a "
    "padded convolution), which no bias makes up for"
)
SHARED = "it gives out a constant, and the bias behind it is used elsewhere as well"
RESIZED = (
    "it gives out a constant whose effect changes with the size of the inputs, which no bias makes "
    "up for"
)


class Gap(NamedTuple):
    """Part of a value that is missing without the removed units.

    Attributes:
        array: Array of the value's shape.
        units: Factors and units that it comes from.
        uneven: Whether a leaf was added that could not take it up.
    """

    array: Any
    units: frozenset[tuple[Factor, int]]
    uneven: bool = False


class Use(NamedTuple):
    """Leaf added to or subtracted from activations, with the change it takes up there."""

    elements: np.ndarray
    change: np.ndarray
    units: frozenset[tuple[Factor, int]]


def fold(runs: Sequence[tuple[Analysis, Alive]]) -> tuple[Changes, Failures]:
    """Finds the changes of leaves that make up for removed units.

    Args:
        runs: Analyses of the network with pruned weights at zero, on inputs of several sizes, and
            for each which units stay, booleans for its factors.

    Returns:
        Arrays to add to leaves, by key path; and factors and units that have to stay, each with a
        reason, in which case the changes are incomplete.
    """
    (analysis, alive), *others = runs
    if all(x.all() for x in alive.values()):
        return {}, []
    total, uses, failures = _fold(analysis, alive)
    for other in others:
        again, more, failed = _fold(*other)
        largest = max(np.abs(total).max(initial=0.0), np.abs(again).max(initial=0.0))
        differs = np.abs(total - again) > EXACT * largest
        blamed = [x for x in (*uses, *more) if x.change.any() and differs[x.elements].any()]
        failures += failed + [(*unit, RESIZED) for use in blamed for unit in use.units]
    return _by_leaf(total, analysis), failures


def _fold(analysis: Analysis, alive: Alive) -> tuple[np.ndarray, list[Use], Failures]:
    """What is added to every element of the leaves, the sums that take it up, and failures."""
    tape = analysis.tape
    size = sum(x.elements.size for x in analysis.values.values())
    meetings = {id(x.step): x for x in analysis.meetings}
    gaps: dict[Value, Gap] = {}
    uses: list[Use] = []
    others: list[np.ndarray] = []
    failures: Failures = []
    for step in tape.steps:
        met = meetings.get(id(step))
        own = None if met is None else _opened(met, alive)
        gap = _carried(step, gaps, uses, failures)
        if own is not None and gap is not None:
            units = own.units | gap.units
            gap = Gap(own.array + gap.array, units, gap.uneven)
        gap = gap or own
        if gap is not None:
            living = _axes.alive_entries(step.results[0].shape, step.results[0].axes, alive)
            gaps[step.results[0]] = gap._replace(array=np.where(living, gap.array, 0))
        if step.results[0].elements is None and not _is_use(step):
            others += [x.elements for x in step.operands if x.elements is not None]
    for value in tape.outputs:
        if value in gaps and gaps[value].array.any():
            _fail(gaps[value], "the outputs", failures)
    total, conflicts = _settle(uses, others, size)
    return total, uses, failures + conflicts


def _opened(meeting: Meeting, alive: dict[Factor, np.ndarray]) -> Gap | None:
    """The gap that removed units leave in the sum that took them in."""
    sides = meeting.sides()
    gone = [f for f in meeting.factors if f in alive and not alive[f].all()]
    if sides is None or not gone:
        return None
    (data, data_along), (weights, along) = sides
    stays = _axes.alive_entries(data.shape, data.axes, alive, data_along)
    lost = np.where(stays, 0, np.asarray(data.array))
    free = [i for i in range(len(weights.shape)) if i not in along]
    taken = nonzero(weights) & _axes.alive_entries(weights.shape, weights.axes, alive, free)
    # Blame the units that give out something, and whose weights are not zero.
    units = set()
    for factor in gone:
        given = np.any(
            [x.any(axis=1) for x in _axes.by_unit(lost, data.axes, factor, data_along)], 0
        )
        met = np.any([x.any(axis=1) for x in _axes.by_unit(taken, weights.axes, factor, along)], 0)
        units |= {(factor, i) for i in np.flatnonzero(given & met & ~alive[factor]).tolist()}
    if not units:
        return None
    pair = (jnp.asarray(lost, data.array.dtype), weights.array)
    array = meeting.step.run(*(pair if data is meeting.step.operands[0] else pair[::-1]))[0]
    return Gap(np.asarray(array), frozenset(units))


def _carried(step: Step, gaps: dict, uses: list[Use], failures: Failures) -> Gap | None:
    """The gap of a result from those of the operands, taken up by a leaf where one can."""
    found = [gaps.get(x) for x in step.operands]
    if step.name in ("add", "sub", "add_any"):
        return _sum(step, found, uses)
    if not any(x is not None and x.array.any() for x in found):
        return None
    units = frozenset().union(*(x.units for x in found if x is not None))
    uneven = any(x.uneven for x in found if x is not None)
    if _is_linear(step, found):
        arrays = [
            x.array if x is not None else _rest(step, operand)
            for x, operand in zip(found, step.operands, strict=True)
        ]
        return Gap(np.asarray(step.run(*arrays)[0]), units, uneven)
    _fail(Gap(None, units, uneven), f"{step.name!r}", failures)
    return None


def _rest(step: Step, operand: Value) -> Any:
    """An operand without gap: a factor or a divisor as it is, else nothing."""
    keeps = step.name in ("mul", "div", "dot_general", "conv_general_dilated")
    return operand.array if keeps else np.zeros_like(operand.array)


def _is_linear(step: Step, found: Sequence[Gap | None]) -> bool:
    """Whether an operation is linear in the operands that have gaps."""
    if len(step.results) != 1:
        return False
    if step.name in (*MOVES, *SAME, "neg", "reduce_sum"):
        return True
    if step.name in ("mul", "dot_general", "conv_general_dilated"):
        pairs = zip(step.operands, found, strict=True)
        return sum(x.from_inputs for x, _ in pairs) == 1
    return step.name == "div" and not step.operands[1].from_inputs


def _is_use(step: Step) -> bool:
    """Whether a leaf is added to or subtracted from activations."""
    data = [x for x in step.operands if x.from_inputs]
    return step.name in ("add", "sub", "add_any") and len(data) == 1


def _sum(step: Step, found: Sequence[Gap | None], uses: list[Use]) -> Gap | None:
    """The gap of a sum or difference; a leaf takes it up if that is exact."""
    shape = step.results[0].shape
    signs = (1, -1) if step.name == "sub" else (1, 1)
    rows = [(s, x) for s, x in zip(signs, found, strict=True) if x is not None]
    array = sum((s * np.broadcast_to(x.array, shape) for s, x in rows), np.zeros(shape))
    units = frozenset().union(*(x.units for _, x in rows))
    gap = Gap(array, units, any(x.uneven for _, x in rows))
    for sign, operand in zip(signs, step.operands, strict=True):
        if operand.elements is None or not _is_use(step):
            continue
        # every element takes up the mean over its copies, which is exact if they are all the same
        places, inverse = np.unique(np.broadcast_to(operand.elements, shape), return_inverse=True)
        inverse = inverse.ravel()
        mean = np.bincount(inverse, array.ravel()) / np.bincount(inverse)
        if np.abs(mean[inverse] - array.ravel()).max() <= EXACT * np.abs(array).max():
            uses.append(Use(places, sign * mean, units))
            return None
        uses.append(Use(places, np.zeros(places.size), units))
        return gap._replace(uneven=True)
    return gap if rows and array.any() else None


def _fail(gap: Gap, where: str, failures: Failures) -> None:
    reason = f"it gives out a constant, and no bias makes up for it before {where}"
    failures += [(factor, unit, UNEVEN if gap.uneven else reason) for factor, unit in gap.units]


def _settle(uses: list[Use], others: list, size: int) -> tuple[np.ndarray, Failures]:
    """The change of every element, and units whose bias would need several or is used elsewhere."""
    total, failures = np.full(size, np.nan), []
    blamed = [use for use in uses if use.change.any()]
    largest = max((np.abs(use.change).max() for use in blamed), default=0.0)
    refused = np.zeros(size, bool)
    for use in uses:
        known = total[use.elements]
        first = np.isnan(known)
        refused[use.elements] |= ~first & (np.abs(known - use.change) > EXACT * largest)
        total[use.elements] = np.where(first, use.change, known)
    uneven = refused.copy()
    total = np.nan_to_num(total)
    if blamed:
        for elements in others:
            refused[elements] |= total[elements] != 0
    for use in blamed:
        if refused[use.elements].any():
            reason = UNEVEN if uneven[use.elements].any() else SHARED
            failures += [(factor, unit, reason) for factor, unit in use.units]
    return total, failures


def _by_leaf(total: np.ndarray, analysis: Analysis) -> Changes:
    found = {}
    for name, value in analysis.values.items():
        change = total[value.elements]
        if change.any():
            found[name] = change
    return found
