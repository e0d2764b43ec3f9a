"""Search among weights with few levels: moves that keep the number of zeros.

A weight is zero or `sign(w) · scale · ℓ` with a level ℓ of 1 to L.  A move puts one kept weight on
another level, or prunes one kept weight and puts a pruned one on its best level.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HOT, COLD = 0.3, 1e-2  # temperatures of a walk, in units of the mean cost of one level


class Problem(NamedTuple):
    """Quadratic cost of a block of weights on levels.

    Attributes:
        weights: w, shape (n,).
        fisher: F, shape (n, n), symmetric.
        unit: `scale · sign(w)`, the value of level 1, shape (n,).
    """

    weights: jax.Array
    fisher: jax.Array
    unit: jax.Array


class Place(NamedTuple):
    """Levels, the slope of the cost there, `F (v − w)`, and the number of moves made."""

    levels: jax.Array  # shape=(n,), int32
    slope: jax.Array  # shape=(n,)
    moves: jax.Array  # shape=(), int32


class Move(NamedTuple):
    """Two weights and their changes in levels; the second change is 0 for a move of one weight."""

    change: jax.Array  # of the cost, shape=()
    i: jax.Array
    i_by: jax.Array
    j: jax.Array
    j_by: jax.Array


def cost(problem: Problem, levels: jax.Array) -> jax.Array:
    """Cost `½ (v − w)ᵀF(v − w)` of levels, in nats per example."""
    error = problem.unit * levels - problem.weights
    return error @ (problem.fisher @ error) / 2


def at(problem: Problem, levels: jax.Array) -> Place:
    """The place of some levels, computed from scratch."""
    error = problem.unit * levels - problem.weights
    return Place(levels, problem.fisher @ error, jnp.zeros((), jnp.int32))


def descend(problem: Problem, levels: jax.Array, top: int, steps: jax.Array) -> Place:
    """Makes the best move, in O(n² + n·L), until none lowers the cost.

    Args:
        problem: Weights and their Fisher.
        levels: Levels to start at.
        top: Highest level L.
        steps: Largest number of moves.
    """
    # smaller changes are rounding, by which the search could cycle
    noise = 8 * jnp.finfo(problem.fisher.dtype).eps * jnp.abs(cost(problem, levels))

    def unfinished(carry):
        place, move = carry
        return (move.change < -noise) & (place.moves < steps)

    def advance(carry):
        place, move = carry
        place = _moved(problem, place, move)
        return place, _best(problem, place, top)

    start = at(problem, levels)
    return jax.lax.while_loop(unfinished, advance, (start, _best(problem, start, top)))[0]


def anneal(
    problem: Problem, levels: jax.Array, top: int, key: jax.Array, sweeps: jax.Array
) -> jax.Array:
    """Metropolis walk by random moves, while the temperature falls from `HOT` to `COLD`.

    Args:
        problem: Weights and their Fisher.
        levels: Levels to start at.
        top: Highest level L.
        key: Random key.
        sweeps: Number of proposals for each weight.

    Returns:
        Levels of the lowest cost on the way.
    """
    n = len(levels)
    steps = sweeps * n
    diagonal = jnp.diagonal(problem.fisher)
    level = jnp.mean(problem.unit**2 * diagonal)  # cost of one level

    def step(k, carry):
        place, value, best, lowest = carry
        pick, accept, rise = jax.random.split(jax.random.fold_in(key, k), 3)
        i, j = jax.random.randint(pick, (2,), 0, n)
        to = jax.random.randint(rise, (), 1, top + 1, levels.dtype)
        # i is put on a level; if it was pruned, j is pruned for it
        swap = place.levels[i] == 0
        possible = ~swap | (place.levels[j] > 0)
        j_by = jnp.where(swap, -place.levels[j], 0)
        move = _priced(problem, place, i, to - place.levels[i], j, j_by)
        temperature = level * HOT * (COLD / HOT) ** (k / steps)
        threshold = -temperature * jnp.log(jax.random.uniform(accept, minval=1e-30))
        taken = possible & (move.change <= threshold)
        move = move._replace(
            i_by=jnp.where(taken, move.i_by, 0), j_by=jnp.where(taken, move.j_by, 0)
        )
        place = _moved(problem, place, move)
        value = value + jnp.where(taken, move.change, 0)
        better = value < lowest
        return place, value, jnp.where(better, place.levels, best), jnp.minimum(value, lowest)

    start = cost(problem, levels)
    return jax.lax.fori_loop(0, steps, step, (at(problem, levels), start, levels, start))[2]


def _priced(problem, place, i, i_by, j, j_by) -> Move:
    """A move with the change of the cost."""
    di, dj = problem.unit[i] * i_by, problem.unit[j] * j_by
    fisher = problem.fisher
    change = di * place.slope[i] + dj * place.slope[j] + di * dj * fisher[i, j]
    change = change + (di**2 * fisher[i, i] + dj**2 * fisher[j, j]) / 2
    return Move(change, i, i_by, j, j_by)


def _moved(problem: Problem, place: Place, move: Move) -> Place:
    levels = place.levels.at[move.i].add(move.i_by).at[move.j].add(move.j_by)
    di, dj = problem.unit[move.i] * move.i_by, problem.unit[move.j] * move.j_by
    slope = place.slope + problem.fisher[move.i] * di + problem.fisher[move.j] * dj
    return Place(levels, slope, place.moves + 1)


def _best(problem: Problem, place: Place, top: int) -> Move:
    """The move that lowers the cost most."""
    levels, slope, _ = place
    n, unit, diagonal = len(levels), problem.unit, jnp.diagonal(problem.fisher)
    kept = levels > 0
    # One kept weight on another level.
    by = jnp.arange(1, top + 1, dtype=levels.dtype) - levels[:, None]
    d = unit[:, None] * by
    changes = d * slope[:, None] + d**2 * diagonal[:, None] / 2
    changes = jnp.where(kept[:, None] & (by != 0), changes, jnp.inf)
    place_of = jnp.argmin(changes)
    i = place_of // top
    none = jnp.zeros((), levels.dtype)
    one = Move(changes.reshape(-1)[place_of], i, by.reshape(-1)[place_of], i, none)
    # A kept i pruned, and a pruned j on the best of its levels.
    di = -unit * levels
    slope_j = slope[None] + problem.fisher * di[:, None]
    tiny = jnp.finfo(problem.fisher.dtype).tiny
    ideal = -slope_j / (unit * jnp.maximum(diagonal, tiny))[None]
    to = jnp.clip(jnp.round(ideal), 1, top)
    dj = unit[None] * to
    changes = (di * slope + di**2 * diagonal / 2)[:, None] + dj * slope_j
    changes = changes + dj**2 * diagonal[None] / 2
    changes = jnp.where(kept[:, None] & ~kept[None], changes, jnp.inf)
    place_of = jnp.argmin(changes)
    i, j = place_of // n, place_of % n
    to = to.reshape(-1)[place_of].astype(levels.dtype)
    two = Move(changes.reshape(-1)[place_of], i, -levels[i], j, to)
    return jax.tree.map(lambda a, b: jnp.where(one.change <= two.change, a, b), one, two)
