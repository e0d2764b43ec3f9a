"""Whole numbers of cells by marginal analysis: each further cell goes where it saves most."""

import heapq
import math
from collections.abc import Callable

import numpy as np

HALVINGS = 200  # of the interval of multipliers: down to neighbouring floating-point numbers


def for_number(costs: np.ndarray, sizes: np.ndarray, cells: int) -> np.ndarray:
    """Numbers n ≥ 1 with the least `Σ s c / n` among those with `Σ s n` at most some cells.

    Groups of several weights may leave some cells that suffice for none of them.

    Args:
        costs: Rise c of the loss with one cell for each weight of a group, a mean over its weights.
        sizes: Number s of weights of each group.
        cells: Number of cells, at least one for each weight.
    """
    if not costs.any():
        return np.ones(len(costs), np.int64)
    few, many = _bracket(costs, lambda n: (sizes * n).sum() >= cells)
    return _raised(costs, sizes, few, many, cells, lambda _: False)


def for_rise(costs: np.ndarray, sizes: np.ndarray, rise: float) -> np.ndarray:
    """Numbers n ≥ 1 with the fewest cells `Σ s n` among those with `Σ s c / n` at most a rise."""
    if (sizes * costs).sum() <= rise:
        return np.ones(len(costs), np.int64)
    few, many = _bracket(costs, lambda n: (sizes * costs / n).sum() <= rise)
    return _raised(costs, sizes, few, many, math.inf, lambda expected: expected <= rise)


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
