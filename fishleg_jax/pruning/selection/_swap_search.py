"""Repeats the best swap of a pruned and a kept weight until none lowers the cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._checks.numbers import check_count
from fishleg_jax._jit import jitted
from fishleg_jax.pruning.selection._objectives import COMPENSATED, QUBO, Objective, as_floats

OBJECTIVES = {"compensated": COMPENSATED, "qubo": QUBO}


class Found(NamedTuple):
    """Pruned set and its costs, as `swap_search` returns them.

    Attributes:
        pruned: Pruned set, with as many weights as at the start, in every group.
        before: Cost of the start.
        after: Cost of the set, never above `before`.
        swaps: Number of swaps.
    """

    pruned: jax.Array  # shape=(n,), bool
    before: jax.Array  # shape=(), float
    after: jax.Array  # shape=(), float
    swaps: jax.Array  # shape=(), int32

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


def swap_search(
    vector: jax.Array,
    matrix: jax.Array,
    pruned: jax.Array,
    *,
    objective: str = "compensated",
    groups: jax.Array | None = None,
    steps: int = 1000,
) -> Found:
    """Lowers the cost of a pruned set by swapping one pruned with one kept weight at a time.

    Every step makes the best of all swaps, whose costs follow from rank-one updates in O(n²), and
    the search ends when none lowers the cost: in a set that no single swap improves, which need not
    be the best of all.

    Args:
        vector: First argument of `compensated_cost` or `qubo_cost`, shape (n,).
        matrix: Second argument, shape (n, n).
        pruned: Starting set, booleans of shape (n,).
        objective: `compensated`, the default, or `qubo`.
        groups: Whole numbers of shape (n,); weights are swapped within a group.  None for a single
            group.
        steps: Largest number of swaps, 1000 by default.

    Returns:
        The set, and its cost before and after.  If numbers are not finite it is the start.

    Raises:
        ValueError: An unknown objective, mismatched shapes, an empty array, fewer than one step.

    References:
        Yu et al., The combinatorial brain surgeon, ICML 2022, whose objective is the
        `qubo`.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> fisher = jnp.array([[2.2, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 2.3]])
        >>> start = jnp.array([True, True, False])  # of least diagonal, but one does for the other
        >>> found = flj.selection.swap_search(jnp.ones(3), jnp.linalg.inv(fisher), start)
        >>> found.pruned.tolist(), int(found.swaps)
        ([False, True, True], 1)
    """
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)}, got {_text.shown(objective)}"
        )
    steps = check_count(steps, "steps")
    vector, matrix, pruned = as_floats(vector), as_floats(matrix), jnp.asarray(pruned)
    if groups is None:
        groups = jnp.zeros(pruned.shape, jnp.int32)
    groups = jnp.asarray(groups)
    if groups.shape != pruned.shape:
        raise ValueError(f"groups must have shape {pruned.shape}, got {groups.shape}")
    return jitted(_search, OBJECTIVES[objective])(vector, matrix, pruned, groups, steps)


def _search(
    objective: Objective,
    vector: jax.Array,
    matrix: jax.Array,
    pruned: jax.Array,
    groups: jax.Array,
    steps: jax.Array,
) -> Found:
    together = groups[:, None] == groups[None]
    before = objective.cost(vector, matrix, pruned)
    # smaller changes are rounding, by which the search could cycle
    noise = 8 * jnp.finfo(matrix.dtype).eps * jnp.abs(before)

    def best(state, pruned):
        changes = objective.changes(state)
        allowed = together & pruned[:, None] & ~pruned[None] & jnp.isfinite(changes)
        changes = jnp.where(allowed, changes, jnp.inf).reshape(-1)
        place = jnp.argmin(changes)
        return changes[place], place // len(pruned), place % len(pruned)

    def unfinished(carry):
        _, _, (change, *_), swaps = carry
        return (change < -noise) & (swaps < steps)

    def advance(carry):
        state, pruned, (_, i, j), swaps = carry
        state = objective.exchange(state, i, j)
        pruned = pruned.at[i].set(False).at[j].set(True)
        return state, pruned, best(state, pruned), swaps + 1

    # Swap until nothing lowers the cost.
    state = objective.begin(vector, matrix, pruned)
    first = state, pruned, best(state, pruned), jnp.zeros((), jnp.int32)
    _, found, _, swaps = jax.lax.while_loop(unfinished, advance, first)
    # recomputed, as the running sum of updates has been rounded many times
    after = objective.cost(vector, matrix, found)
    lower = (after < before) & jnp.isfinite(after) & jnp.isfinite(before)
    return Found(
        jnp.where(lower, found, pruned),
        before,
        jnp.where(lower, after, before),
        jnp.where(lower, swaps, 0),
    )
