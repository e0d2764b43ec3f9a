"""Cells for each weight: equal numbers, or by curvature."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax._jit import is_traced
from fishleg_jax.storage import coding as codings
from fishleg_jax.storage.cells import Cell
from fishleg_jax.storage.coding import Coding, check_cells, takes_cells, variances
from fishleg_jax.storage.marginal import for_number, for_rise

MOST_AXES = 32  # of an array


def allot(
    fisher_diagonal: Any,
    params: Any,
    *,
    cells: int | None = None,
    rise: float | None = None,
    cell: Cell | None = None,
    coding: Coding | None = None,
    shared: int | Sequence[int] | None = None,
) -> Any:
    """Allots cells to weights by curvature, more to those whose noise raises the loss most.

    Averaging nᵢ cells leaves a variance of σᵢ²/nᵢ, so that the loss rises by `½ Σ Fᵢᵢ σᵢ² / nᵢ`.
    For a given `Σ nᵢ` that is least, by Lagrange, where nᵢ is proportional to `√Fᵢᵢ σᵢ`; with whole
    numbers of at least 1, where no cell is worth more elsewhere: nᵢ is the smallest number with
    `Fᵢᵢ σᵢ² / (2 nᵢ (nᵢ + 1))` at most the multiplier (Fox: the marginal analysis is optimal, since
    every term is convex in nᵢ).  Runs on the host.

    The numbers have to be kept beside the weights, and that costs cells as well: `cost` counts
    them.  Weights that share a number save that, at the price of a rougher allotment; theirs is the
    number for their mean curvature.

    For weights with numbers of their own, and for groups of one size, the allotment is the best
    one.  For groups of different sizes it is a knapsack problem, which is solved to within one step
    of one group, a step being one more cell for each of its weights: with `rise` the fewest cells
    are exceeded by less than the number of weights of the largest group, with `cells` the least
    rise by less than the fall of the first step that no longer fits, in the order of falls per
    cell.

    Args:
        fisher_diagonal: Diagonal of the Fisher at the weights, a pytree like them, in nats per
            squared weight, such as `estimator.fisher_diagonal(state, params)`.
        params: Weights, any pytree of floating-point arrays.
        cells: Number of cells for all weights together; all of them are used, unless the loss does
            not depend on any weight that needs a cell, or too few are left for weights that share
            a number.  Or None, with `rise`.
        rise: Largest expected rise of the loss in nats per example, which is kept with few cells.
            Or None, with `cells`.
        cell: Memory cell; `pcm()` by default.
        coding: Coding of the weights; by default `Coding()`, with protected signs and zeros and a
            range for each leaf.
        shared: Axes along which weights of a leaf have the same number of cells, such as -1 for one
            number for each row of kernels (..., in, out); leaves without such an axis have one
            number.  None, the default, for numbers of their own.

    Returns:
        Pytree of int32 like the weights: at least 1 for weights that need cells, 0 for zeros that
        are protected.

    Raises:
        ValueError: A Fisher of another structure or below zero, both or neither of `cells` and
            `rise`, fewer cells than weights that need one, axes that are no whole numbers, or a
            call under `jit`.

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
    groups = _groups(params, shared)
    count = int(groups.max(initial=-1)) + 1
    sizes = np.bincount(groups[needed], minlength=count)
    used = sizes > 0
    mean = np.bincount(groups[needed], costs[needed], count)[used] / sizes[used]
    if cells is not None:
        least = int(needed.sum())
        cells = numbers.check_count(cells, "cells")
        if cells < least:
            raise ValueError(
                f"cells must be at least {least}, one for every weight that needs one, got {cells}"
            )
        own = for_number(mean, sizes[used], cells)
    else:
        own = for_rise(mean, sizes[used], numbers.check_positive(rise, "rise"))
    of_group = np.zeros(count, np.int64)
    of_group[used] = own
    found = np.where(needed, of_group[groups], 0)
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


def _groups(params: Any, shared: int | Sequence[int] | None) -> np.ndarray:
    """Number of the group of every weight; those of a group share their number of cells."""
    several = () if shared is None else shared
    axes = tuple(several) if isinstance(several, Sequence) else (several,)
    if not all(numbers.is_whole(axis, -MOST_AXES) for axis in axes):
        raise ValueError(f"shared must be an axis, several or None, got {_text.shown(shared)}")
    found, begin = [], 0
    for leaf in jax.tree.leaves(params):
        own = {axis % leaf.ndim for axis in axes if -leaf.ndim <= axis < leaf.ndim}
        if axes and not own:  # one number
            own = set(range(leaf.ndim))
        shape = tuple(1 if i in own else n for i, n in enumerate(leaf.shape))
        ids = begin + np.arange(math.prod(shape)).reshape(shape)
        found.append(np.broadcast_to(ids, leaf.shape).ravel())
        begin += math.prod(shape)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


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
