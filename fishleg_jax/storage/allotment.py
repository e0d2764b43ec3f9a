"""Cells for each weight: equal numbers, or by curvature the fewest for an expected loss."""

import heapq
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax._jit import is_traced
from fishleg_jax.storage import coding as codings
from fishleg_jax.storage.cells import Cell
from fishleg_jax.storage.coding import Coding, check_cells, takes_cells, variances

HALVINGS = 200  # of the interval of multipliers: down to neighbouring floating-point numbers


def allot(
    fisher_diagonal: Any,
    params: Any,
    *,
    cells: int | None = None,
    rise: float | None = None,
    cell: Cell | None = None,
    coding: Coding | None = None,
) -> Any:
    """Allots cells to weights by curvature: the least expected rise of the loss for their number.

    Averaging nᵢ cells leaves a variance of σᵢ²/nᵢ, so that the loss rises by `½ Σ Fᵢᵢ σᵢ² / nᵢ`.
    For a given `Σ nᵢ` that is least, by Lagrange, where nᵢ is proportional to `√Fᵢᵢ σᵢ`; with whole
    numbers of at least 1, where no cell is worth more elsewhere: nᵢ is the smallest number with
    `Fᵢᵢ σᵢ² / (2 nᵢ (nᵢ + 1))` at most the multiplier (Fox: the marginal analysis is optimal, since
    every term is convex in nᵢ).  Runs on the host.

    Args:
        fisher_diagonal: Diagonal of the Fisher at the weights, a pytree like them, in nats per
            squared weight, such as `estimator.fisher_diagonal(state, params)`.
        params: Weights, any pytree of floating-point arrays.
        cells: Number of cells for all weights together; all of them are used, unless the loss does
            not depend on any weight that needs a cell.  Or None, with `rise`.
        rise: Expected rise of the loss in nats per example, for which to allot the fewest cells.
            Or None, with `cells`.
        cell: Memory cell; `pcm()` by default.
        coding: Coding of the weights; by default `Coding()`, with protected signs and zeros and a
            range for each leaf.

    Returns:
        Pytree of int32 like the weights: at least 1 for weights that need cells, 0 for zeros that
        are protected.

    Raises:
        ValueError: A Fisher of another structure or below zero, both or neither of `cells` and
            `rise`, fewer cells than weights that need one, or a call under `jit`.

    References:
        Isik et al., Neural network compression for noisy storage devices, ACM TECS 2023, for the
        setting; Fox, Discrete optimization via marginal analysis, Management Science 13, 1966.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> weights, fisher = jnp.array([1.0, -1.0, 1.0]), jnp.array([9.0, 1.0, 1.0])
        >>> storage.allot(fisher, weights, cells=10, cell=storage.gaussian(0.1)).tolist()
        [6, 2, 2]
    """
    costs, needed, tree = _costs(fisher_diagonal, params, cell, coding)
    if (cells is None) == (rise is None):
        raise ValueError(f"exactly one of cells and rise must be given, got {cells} and {rise}")
    kept = costs[needed]
    if cells is not None:
        least = int(needed.sum())
        cells = numbers.check_count(cells, "cells")
        if cells < least:
            raise ValueError(
                f"cells must be at least {least}, one for every weight that needs one, got {cells}"
            )
        own = _for_number(kept, cells)
    else:
        own = _for_rise(kept, numbers.check_positive(rise, "rise"))
    found = np.zeros(len(costs), np.int64)
    found[needed] = own
    if found.size and found.max() >= 2**31:
        raise ValueError("rise must be larger, or cells fewer: a weight would take 2³¹ cells")
    return _split(found, params, tree)


def equal(params: Any, cells: int, *, coding: Coding | None = None) -> Any:
    """Allots cells to weights in numbers as equal as can be.

    Args:
        params: Weights, any pytree of floating-point arrays.
        cells: Number of cells for all weights together; where it does not divide, the weights with
            one cell more are spread evenly.
        coding: Coding of the weights; `Coding()` by default.

    Returns:
        Pytree of int32 like the weights: 0 for zeros that are protected.

    Raises:
        ValueError: Fewer cells than weights that need one, or a call under `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> storage.equal(jnp.array([1.0, 0.0, 2.0, 3.0]), 4).tolist()
        [1, 0, 1, 2]
    """
    coding = Coding() if coding is None else coding
    codings.check(codings.pcm(), coding)
    _refuse_traced(params)
    codings.check_params(params)
    leaves = jax.tree.leaves(takes_cells(params, coding))
    needed = np.concatenate([np.asarray(x).ravel() for x in leaves])
    number, cells = int(needed.sum()), numbers.check_count(cells, "cells")
    if cells < number:
        raise ValueError(
            f"cells must be at least {number}, one for every weight that needs one, got {cells}"
        )
    found = np.zeros(len(needed), np.int64)
    found[needed] = np.diff(np.arange(number + 1) * cells // max(number, 1))
    return _split(found, params, jax.tree.structure(params))


def expected_rise(
    fisher_diagonal: Any,
    params: Any,
    cells: Any,
    *,
    cell: Cell | None = None,
    coding: Coding | None = None,
) -> float:
    """Expected rise of the loss from the noise of the cells, `½ Σ Fᵢᵢ σᵢ² / nᵢ`.

    Args:
        fisher_diagonal: Diagonal of the Fisher at the weights, a pytree like them, in nats per
            squared weight.
        params: Weights, any pytree of floating-point arrays.
        cells: Number of cells for each weight, a whole number or a pytree of integers like the
            weights.
        cell: Memory cell; `pcm()` by default.
        coding: Coding of the weights; `Coding()` by default.

    Returns:
        The rise in nats per example.

    Raises:
        ValueError: Arguments that `allot` or `write` reject.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import storage
        >>> weights, fisher = jnp.array([1.0, -1.0]), jnp.array([4.0, 2.0])
        >>> storage.expected_rise(fisher, weights, 3, cell=storage.gaussian(1.0))
        1.0
    """
    costs, needed, _ = _costs(fisher_diagonal, params, cell, coding)
    cells = check_cells(params, cells, Coding() if coding is None else coding)
    number = np.concatenate([np.asarray(n).ravel() for n in jax.tree.leaves(cells)])
    return float((costs[needed] / number[needed]).sum())


def _refuse_traced(tree: Any) -> None:
    if is_traced(tree):
        raise ValueError("cells are allotted on the host: call it outside of jit")


def _costs(
    fisher: Any, params: Any, cell: Cell | None, coding: Coding | None
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Rises `½ F σ²` of the loss with one cell each, which weights need cells, and the tree."""
    _refuse_traced((fisher, params))
    spread = variances(params, cell=cell, coding=coding)
    _tree.check_same(params, fisher, "fisher_diagonal")
    arrays.check_costs_are_numbers(fisher)
    for name, leaf in _tree.named_leaves(fisher):
        values = np.asarray(leaf, float)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"fisher_diagonal: {name!r} must be finite and at least 0, got values from "
                f"{values.min()} to {values.max()}"
            )
    costs = np.concatenate(
        [
            0.5 * np.asarray(f, float).ravel() * np.asarray(s, float).ravel()
            for f, s in zip(jax.tree.leaves(fisher), jax.tree.leaves(spread), strict=True)
        ]
    )
    needed = takes_cells(params, Coding() if coding is None else coding)
    flags = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(needed)])
    return costs, flags, jax.tree.structure(params)


def _split(flat: np.ndarray, params: Any, tree: Any) -> Any:
    """A flat array of numbers as a pytree like the weights."""
    leaves, begin = [], 0
    for leaf in jax.tree.leaves(params):
        part = flat[begin : begin + leaf.size].reshape(jnp.shape(leaf))
        leaves.append(jnp.asarray(part, jnp.int32))
        begin += leaf.size
    return tree.unflatten(leaves)


def _at(costs: np.ndarray, multiplier: float) -> np.ndarray:
    """Smallest n ≥ 1 for each cost c with c / (n (n + 1)) at most the multiplier."""
    number = np.ceil((np.sqrt(1 + 4 * costs / multiplier) - 1) / 2)
    return np.maximum(number, 1).astype(np.int64)


def _bracket(costs: np.ndarray, enough: Any) -> tuple[np.ndarray, np.ndarray]:
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


def _for_number(costs: np.ndarray, cells: int) -> np.ndarray:
    if not costs.size or not costs.any():
        return np.ones(len(costs), np.int64)
    few, many = _bracket(costs, lambda n: n.sum() >= cells)
    return _raised(costs, few, many, lambda total, _: total >= cells)


def _for_rise(costs: np.ndarray, rise: float) -> np.ndarray:
    if costs.sum() <= rise:
        return np.ones(len(costs), np.int64)
    few, many = _bracket(costs, lambda n: (costs / n).sum() <= rise)
    return _raised(costs, few, many, lambda _, expected: expected <= rise)


def _raised(costs: np.ndarray, few: np.ndarray, many: np.ndarray, done: Any) -> np.ndarray:
    """Adds cells to the first allotment, the most useful one first, but none beyond the second."""
    number = few.copy()
    total, expected = int(number.sum()), float((costs / number).sum())
    heap = [(-costs[i] / (number[i] * (number[i] + 1)), i) for i in np.flatnonzero(many > few)]
    heapq.heapify(heap)
    while heap and not done(total, expected):
        gain, i = heapq.heappop(heap)
        number[i] += 1
        total, expected = total + 1, expected + gain
        if number[i] < many[i]:
            heapq.heappush(heap, (-costs[i] / (number[i] * (number[i] + 1)), i))
    return number
