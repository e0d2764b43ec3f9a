"""Choice of a solve's damping by the measured loss."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree

FACTOR = 4.0  # factor between neighbouring dampings
POOR = 0.25  # ratio of the prediction's error above which the damping may be too small
SHORT = 0.1  # share of the gain predicted for the full step from which a difference counts


class Trial(NamedTuple):
    """Solve at one damping; arrays under `jit`.

    Attributes:
        raised: Damping relative to the one that the search began with.
        x: Solution, where the next solve starts.
        delta: Best part of the change.
        loss: Loss after that change; infinite for NaN.
        info: Numbers that the compensation reports.
        too_long: Whether part of the step is better than the whole by a difference that counts.
        gain: Amount by which the compensation lowers the quadratic model.
    """

    raised: float | jax.Array
    x: Any
    delta: Any
    loss: float | jax.Array
    info: dict
    too_long: bool | jax.Array
    gain: float | jax.Array


def search(
    solve: Callable[[Any, float], Trial],
    x: Any,
    *,
    attempts: int,
    chosen: bool,
    lower: bool,
    ended: Callable[[], bool] = lambda: False,
) -> Trial:
    """Solves at a few neighbouring dampings and returns the solve with the lowest loss.

    Only differences that count decide: otherwise the dampings of stages with little at stake would
    drift with the noise of the examples.

    With lower dampings to try, the search walks down while the loss falls, and if the first step
    down was worse, up.  Otherwise it walks up, if the step is too long or the loss was badly
    predicted, also past dampings that make no difference.

    Args:
        solve: Function `(x, raised) -> Trial`, from a starting point.
        x: First starting point.
        attempts: Largest number of solves.
        chosen: Whether to search for a better damping at all; otherwise it is only raised, while
            the step is too long.
        lower: Whether to try dampings below the first one.
        ended: Function that says whether no further solve may begin.
    """

    def too_small(trial: Trial) -> bool:
        # a ratio may be NaN
        return trial.too_long or (chosen and not trial.info["ratio"] <= POOR)

    best = last = solve(x, 1.0)
    may_turn = chosen and lower
    upwards = not may_turn
    if upwards and not too_small(best):
        return best
    for _ in range(attempts - 1):
        if ended():
            break
        trial = solve(last.x, last.raised * (FACTOR if upwards else 1 / FACTOR))
        # too small a damping predicts too large a gain, or one that is not finite
        counts = SHORT * min(filter(math.isfinite, (trial.gain, best.gain)), default=0.0)
        if trial.loss < best.loss - counts:
            best, may_turn = trial, False
            if upwards and not lower and not too_small(best):
                break
            last = trial
        elif upwards and not lower and too_small(trial) and trial.loss <= best.loss + counts:
            last = trial
        elif may_turn:
            upwards, may_turn, last = True, False, best
        else:
            break
    return best


def search_traced(solve: Callable[[Any, jax.Array], Trial], x: Any, *, attempts: int) -> Trial:
    """Search under `jit`, on one batch: raises the damping while the step is too long."""
    one = jnp.ones((), _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(x))))
    shapes = jax.eval_shape(solve, x, one)
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def once(carry):
        k, x, raised, best, _ = carry
        trial = solve(x, raised)
        rescued = jnp.isfinite(trial.loss) & ~jnp.isfinite(best.loss)  # NaN is above all numbers
        better = (trial.loss < best.loss) | rescued
        best = optax.tree.where((k == 0) | better, trial, best)
        return k + 1, trial.x, raised * FACTOR, best, trial.too_long

    start = jnp.zeros((), jnp.int32), x, one, empty, jnp.array(True)
    return jax.lax.while_loop(lambda c: (c[0] < attempts) & c[-1], once, start)[3]
