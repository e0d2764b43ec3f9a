"""The best swap of a pruned and a kept weight, again and again, until none lowers the cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._checks.numbers import check_count
from fishleg_jax._jit import jitted
from fishleg_jax.pruning.selection._objectives import COMPENSATED, QUBO, Objective, as_floats

OBJECTIVES = {"compensated": COMPENSATED, "qubo": QUBO}


class Found(NamedTuple):
    """What `swap_search` returns.

    Attributes:
        pruned: the set, as many as at the start, in every group.
        before: the cost of the start.
        after: the cost of the set, never above it.
        swaps: how many swaps were made.
    """

    pruned: jax.Array  # shape=(n,), bool
    before: jax.Array  # shape=(), float
    after: jax.Array  # shape=(), float
    swaps: jax.Array  # shape=(), int32

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
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
    """Lowers the cost of a pruned set by swaps of one pruned with one kept weight.

    Every step makes the best of all swaps, whose costs follow from rank-one updates in O(n²), and
    the search ends where none lowers the cost: in a set that no single swap betters, which need not
    be the best of all.

    Args:
        vector: the first argument of `compensated_cost` or `qubo_cost`, shape (n,).
        matrix: the second, shape (n, n).
        pruned: where to start, booleans of shape (n,).
        objective: `compensated` or `qubo`.
        groups: whole numbers of shape (n,); weights are swapped within a group.  None for one.
        steps: how many swaps at most.

    Returns:
        The set, and its cost before and after.  Where numbers are not finite it is the start.

    Raises:
        ValueError: an unknown objective, shapes that do not fit, no weight at all, steps below one.

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
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
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
    # below it a change is rounding, and the search could go round in circles
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

    state = objective.begin(vector, matrix, pruned)
    first = state, pruned, best(state, pruned), jnp.zeros((), jnp.int32)
    _, found, _, swaps = jax.lax.while_loop(unfinished, advance, first)
    # anew, as what the updates add up to has been rounded many times
    after = objective.cost(vector, matrix, found)
    lower = (after < before) & jnp.isfinite(after) & jnp.isfinite(before)
    return Found(
        jnp.where(lower, found, pruned),
        before,
        jnp.where(lower, after, before),
        jnp.where(lower, swaps, 0),
    )
