"""Whole numbers of cells by marginal analysis: each further cell goes where it saves most.

A step is one more cell for each weight of a group, and steps are taken in the order of their fall
of the loss per cell.  If all groups have one size this is exact (Fox 1966).  Otherwise it is a
knapsack problem, and exact only where the cells, or the rise, are used up by whole steps.  Let the
first step that does not fit, or that reaches the rise, have size s and fall d:

- No allotment with the cells before that step has a lower rise, and a further cell saves at most
  d / s.  With less than s cells left, the least rise is lower by less than d.
- An allotment with a lower rise than before that step takes more cells than before it, so that the
  fewest are less than s below those with the step.

Exchanges of two steps then bring the allotment closer to the best.
"""

import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

HALVINGS = 200  # of the interval of multipliers: down to neighbouring floating-point numbers


def for_number(costs: np.ndarray, sizes: np.ndarray, cells: int) -> np.ndarray:
    """Numbers n ≥ 1 for a low `Σ s c / n` among those with `Σ s n` at most some cells.

    The least if all groups have one size.  Otherwise above the least by less than the fall
    `s c / (n (n + 1))` of one step: the first in the order of falls per cell that does not fit.

    Args:
        costs: Rise c of the loss with one cell for each weight of a group, a mean over its weights.
        sizes: Number s of weights of each group.
        cells: Number of cells, at least one for each weight.
    """
    if not costs.any():
        return np.ones(len(costs), np.int64)
    few, many = _bracket(costs, lambda n: (sizes * n).sum() >= cells)
    number = _raised(costs, sizes, few, many, cells, lambda _: False)
    return number if _are_equal(sizes) else _lowered(costs, sizes, number, cells)


def for_rise(costs: np.ndarray, sizes: np.ndarray, rise: float) -> np.ndarray:
    """Numbers n ≥ 1 with few cells `Σ s n` among those with `Σ s c / n` at most a rise.

    The fewest if all groups have one size.  Otherwise more by less than the largest size.

    Args:
        costs: Rise c of the loss with one cell for each weight of a group, a mean over its weights.
        sizes: Number s of weights of each group.
        rise: Largest rise of the loss, above 0.
    """
    if (sizes * costs).sum() <= rise:
        return np.ones(len(costs), np.int64)
    few, many = _bracket(costs, lambda n: (sizes * costs / n).sum() <= rise)
    number = _raised(costs, sizes, few, many, math.inf, lambda expected: expected <= rise)
    return number if _are_equal(sizes) else _shortened(costs, sizes, number, rise)


def _are_equal(sizes: np.ndarray) -> bool:
    return bool((sizes == sizes[0]).all())


def _at(costs: np.ndarray, multiplier: float) -> np.ndarray:
    """Smallest n ≥ 1 for each cost c with c / (n (n + 1)) at most the multiplier."""
    number = np.ceil((np.sqrt(1 + 4 * costs / multiplier) - 1) / 2)
    return np.maximum(number, 1).astype(np.int64)


def _bracket(
    costs: np.ndarray, enough: Callable[[np.ndarray], bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Allotments on both sides of the multiplier from which on cells are enough."""
    high = float(costs.max()) / 2  # one cell each
    low = high
    while not enough(_at(costs, low)):
        low /= 16
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        if enough(_at(costs, middle)):
            low = middle
        else:
            high = middle
    return _at(costs, high), _at(costs, low)


def _raised(
    costs: np.ndarray,
    sizes: np.ndarray,
    few: np.ndarray,
    many: np.ndarray,
    most: float,
    done: Callable[[float], bool],
) -> np.ndarray:
    """Adds cells to the first allotment, the most useful ones first, none beyond the second."""
    number = few.copy()
    total, expected = int((sizes * number).sum()), float((sizes * costs / number).sum())
    heap = [(-costs[i] / (number[i] * (number[i] + 1)), i) for i in np.flatnonzero(many > few)]
    heapq.heapify(heap)
    while heap and not done(expected):
        gain, i = heapq.heappop(heap)
        if total + sizes[i] > most:
            continue
        number[i] += 1
        total, expected = total + int(sizes[i]), expected + sizes[i] * gain
        if number[i] < many[i]:
            heapq.heappush(heap, (-costs[i] / (number[i] * (number[i] + 1)), i))
    return number


class _Steps(NamedTuple):
    """The best step up and the best step down of every size of groups; sizes ascend."""

    size: np.ndarray
    up: np.ndarray  # group whose next cell saves most
    gain: np.ndarray  # the fall of the loss by that
    down: np.ndarray  # group whose last cell saves least
    loss: np.ndarray  # the rise of the loss without it; infinite for a group with one


def _steps(costs: np.ndarray, sizes: np.ndarray, number: np.ndarray) -> _Steps:
    gain = sizes * costs / (number * (number + 1.0))
    # the same expression as that of the gain of taking the step again
    fewer = np.maximum(number - 1, 1)
    loss = np.where(number > 1, sizes * costs / (fewer * (fewer + 1.0)), np.inf)
    size, kind, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    up, down = np.lexsort((-gain, kind))[first], np.lexsort((loss, kind))[first]
    return _Steps(size, up, gain[up], down, loss[down])


def _lowered(costs: np.ndarray, sizes: np.ndarray, number: np.ndarray, cells: int) -> np.ndarray:
    """Takes steps that fit, alone or in place of one other, as long as the loss falls."""
    while True:
        steps = _steps(costs, sizes, number)
        free = cells - (sizes * number).sum()
        # the step down, none or one of a size, and the best step up that fits then
        back, loss = np.append(0, steps.size), np.append(0.0, steps.loss)
        highest, where = _running_max(steps.gain)
        fits = np.searchsorted(steps.size, free + back, side="right")
        fall = np.where(fits > 0, highest[fits - 1], 0) - loss
        best = int(fall.argmax())
        found = number.copy()
        if fits[best] > 0:
            found[steps.up[where[fits[best] - 1]]] += 1
        if best > 0:
            found[steps.down[best - 1]] -= 1
        # of the sums, so that rounding cannot exchange the same steps for ever
        if not (sizes * costs / found).sum() < (sizes * costs / number).sum():
            return number
        number = found


def _shortened(costs: np.ndarray, sizes: np.ndarray, number: np.ndarray, rise: float) -> np.ndarray:
    """Takes steps back, alone or for a smaller one, as long as the rise stays within its limit."""
    while True:
        steps = _steps(costs, sizes, number)
        slack = rise - (sizes * costs / number).sum()
        # the step up, none or one of a size, and the largest step down that may go then
        taken, gain = np.append(0, steps.size), np.append(0.0, steps.gain)
        order = np.argsort(steps.loss, kind="stable")
        largest, where = _running_max(steps.size[order])
        fits = np.searchsorted(steps.loss[order], slack + gain, side="right")
        saved = np.where(fits > 0, largest[fits - 1], 0) - taken
        best = int(saved.argmax())
        if saved[best] <= 0:
            return number
        found = number.copy()
        found[steps.down[order[where[fits[best] - 1]]]] -= 1
        if best > 0:
            found[steps.up[best - 1]] += 1
        if (sizes * costs / found).sum() > rise:  # by rounding
            return number
        number = found


def _running_max(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest value up to each place, and where it is."""
    highest = np.maximum.accumulate(values)
    where = np.maximum.accumulate(np.where(values == highest, np.arange(len(values)), 0))
    return highest, where
