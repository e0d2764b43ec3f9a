"""Choice of a solve's damping and number of iterations by the loss on held-out examples."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fishleg_jax._conjugate_gradients import Solve
from fishleg_jax.pruning.compensation._damping_search import FACTOR, SHORT
from fishleg_jax.pruning.compensation._group_system import System
from fishleg_jax.pruning.compensation._subspace import Subspace

EVERY = 3  # iterations between two looks at the held-out loss
PATIENCE = 2  # looks without a new lowest loss that end a solve


class Found(NamedTuple):
    """A solution that was tried.

    Attributes:
        raised: Damping relative to that of the solve.
        x: Solution.
        loss: Held-out loss after it; infinite for NaN.
        gain: Amount by which it lowers the damped quadratic model.
        iterations: Number of iterations of which it is made.
    """

    raised: float
    x: Any
    loss: float
    gain: float
    iterations: int


def search_held_out(
    system: System,
    loss: Callable[[Any], float],
    first: jax.Array | float,
    *,
    iterations: int,
    tolerance: float,
    attempts: int,
    ended: Callable[[], bool],
) -> Found:
    """Solves once, and looks now and then at what the solve offers at a few neighbouring dampings.

    Every few iterations the quadratic model is solved in the space of all directions so far, at
    other dampings too, without further Fisher products.  A look begins at the damping that won the
    look before, and walks down while the loss falls, else up.  A damping wins only if it gains a
    tenth more than the quadratic model predicts for the solve: otherwise the dampings of stages
    with little at stake would drift with the noise of the examples.  The solve ends once two looks
    in a row find no lower loss.

    Args:
        system: System to solve.
        loss: Function from a solution to the held-out loss after it.
        first: Damping of the solve.
        iterations: Largest number of iterations.
        tolerance: Relative residual at which the solve ends.
        attempts: Largest number of dampings to try at a look.
        ended: Function that says whether the time is up.

    Returns:
        The solution with the lowest loss; the last iterate if no loss was finite.
    """
    space = Subspace(system.right, float(first))
    best, raised, worse = None, 1.0, 0

    def at(solver: Callable, raised: float, done: int) -> Found:
        coefficients, gain = solver(space.damping * raised)
        x = space.combined(coefficients)
        found = loss(x)
        return Found(raised, x, found if math.isfinite(found) else math.inf, gain, done)

    def look(done: int) -> bool:
        """Tries solutions; whether the loss has stopped falling."""
        nonlocal best, raised, worse
        solver = space.solver()
        now = at(solver, raised, done)
        factor, may_turn = 1 / FACTOR, True
        for _ in range(attempts - 1):
            trial = at(solver, now.raised * factor, done)
            if trial.loss < now.loss - SHORT * min(trial.gain, now.gain):
                now, may_turn = trial, False
            elif may_turn:
                factor, may_turn = FACTOR, False
            else:
                break
        raised = now.raised
        better = now.loss < (math.inf if best is None else best.loss)
        best, worse = (now, 0) if better else (best, worse + 1)
        return worse >= PATIENCE

    def on_iteration(now: Solve) -> bool:
        done = int(now.iterations)
        return (done % EVERY == 0 and look(done)) or ended()

    solved = system.solve(
        system.start,
        first,
        iterations=iterations,
        tolerance=tolerance,
        on_iteration=on_iteration,
        on_product=space.add,
    )
    done = int(solved.iterations)
    if done % EVERY:
        look(done)
    return best or Found(1.0, solved.x, math.inf, 0.0, done)
