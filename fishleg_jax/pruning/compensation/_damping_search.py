"""Which damping a stage's solve is made with: the ratio proposes, the measured loss disposes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree

FACTOR = 4.0  # between one damping and the next
POOR = 0.25  # a ratio of a prediction's error, above which the damping may be too small
SHORT = 0.1  # of the gain that the full step predicts: a difference that counts


class Trial(NamedTuple):
    """A solve at one damping; arrays under `jit`.

    Attributes:
        raised: the damping over the one that the search began with.
        x: the solution, where the next solve starts.
        delta: the best part of the change.
        loss: what it measures after that change; infinite for NaN.
        info: what the compensation tells of it.
        too_long: whether a part of the step is better than all of it by a difference that counts.
        gain: how far the compensation lowers the quadratic model.
    """

    raised: float | jax.Array
    x: Any
    delta: Any
    loss: float | jax.Array
    info: dict
    too_long: bool | jax.Array
    gain: float | jax.Array


def search(
    solve: Callable[[Any, float], Trial], x: Any, *, attempts: int, chosen: bool, lower: bool
) -> Trial:
    """The solve of the lowest loss among a few dampings, from one to its neighbour.

    Only differences that count do: otherwise the dampings of stages in which little is at stake
    would go for a walk with the noise of the examples.

    Where the step is too long, or the loss was badly predicted, the next one up is tried first,
    and on where that makes no difference yet; else the next one down; and the other direction
    where the first was worse.

    Args:
        solve: `(x, raised) -> Trial`, from a starting point.
        x: the first starting point.
        attempts: how many solves are made at most.
        chosen: whether the program may look for a better damping at all; otherwise it is only
            raised, and while the step is too long.
        lower: whether it may go below the one it begins with.
    """

    def too_small(trial: Trial) -> bool:
        # a ratio may be NaN
        return trial.too_long or (chosen and not trial.info["ratio"] <= POOR)

    best = last = solve(x, 1.0)
    upwards = too_small(best)
    may_turn = chosen and lower
    if not upwards and not may_turn:
        return best
    for _ in range(attempts - 1):
        trial = solve(last.x, last.raised * (FACTOR if upwards else 1 / FACTOR))
        # too small a damping promises too much, or nothing that is a number
        counts = SHORT * min(filter(math.isfinite, (trial.gain, best.gain)), default=0.0)
        if trial.loss < best.loss - counts:
            best, may_turn = trial, False
            if upwards and not too_small(best):
                break
            last = trial
        elif upwards and too_small(trial) and trial.loss <= best.loss + counts:
            last = trial
        elif may_turn:  # too small a damping for other data does not show in the ratio
            upwards, may_turn, last = not upwards, False, best
        else:
            break
    return best


def search_traced(solve: Callable[[Any, jax.Array], Trial], x: Any, *, attempts: int) -> Trial:
    """Under `jit`, where there is one batch to measure on: raised while the step is too long."""
    one = jnp.ones((), _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(x))))
    shapes = jax.eval_shape(solve, x, one)
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def once(carry):
        k, x, raised, best, _ = carry
        trial = solve(x, raised)
        rescued = jnp.isfinite(trial.loss) & ~jnp.isfinite(best.loss)  # NaN is above all numbers
        better = (trial.loss < best.loss) | rescued
        best = _tree.keep_where((k == 0) | better, trial, best)
        return k + 1, trial.x, raised * FACTOR, best, trial.too_long

    start = jnp.zeros((), jnp.int32), x, one, empty, jnp.array(True)
    return jax.lax.while_loop(lambda c: (c[0] < attempts) & c[-1], once, start)[3]
