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
        iterations: Iterations behind it.
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
    """Solves once, and compares a few neighbouring dampings every third iteration.

    The quadratic model is solved in the space of all directions so far, at other dampings too,
    without further Fisher products.  A look begins at the damping that won the look before, and
    walks down while the loss falls, else up, first in the direction that has not lost last.  A
    damping wins only if it lowers the loss by more than a tenth of the predicted gain: otherwise
    the dampings of stages with little at stake would drift with the noise of the examples.  The
    solve ends once two looks in a row find no lower loss.  With one damping to try the iterates
    themselves are compared, and no direction is kept.

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
    # The directions of the solve, and the walk over dampings that goes on from look to look.
    space = Subspace(system.right, float(first))
    best, raised, factor, worse = None, 1.0, 1 / FACTOR, 0

    def tried(raised: float, x: Any, gain: float, done: int) -> Found:
        found = loss(x)
        return Found(raised, x, found if math.isfinite(found) else math.inf, gain, done)

    def walked(done: int) -> Found:
        """Best solution of a look, beginning at the damping that won the look before."""
        nonlocal raised, factor
        solver = space.solver()

        def at(raised: float) -> Found:
            coefficients, gain = solver(space.damping * raised)
            return tried(raised, space.combined(coefficients), gain, done)

        # Take steps while each is better; turn once, if the first one is not.
        now, may_turn = at(raised), True
        for _ in range(attempts - 1 if now.gain > 0 else 0):
            trial = at(now.raised * factor)
            if trial.loss < now.loss - SHORT * min(trial.gain, now.gain):
                now, may_turn = trial, False
                continue
            if not may_turn:
                break
            factor, may_turn = 1 / factor, False
        raised = now.raised
        return now

    def look(solve: Solve) -> bool:
        """Tries solutions; whether the loss has stopped falling."""
        nonlocal best, worse
        done = int(solve.iterations)
        now = walked(done) if attempts > 1 else tried(1.0, solve.x, 0.0, done)
        better = now.loss < (math.inf if best is None else best.loss)
        best, worse = (now, 0) if better else (best, worse + 1)
        return worse >= PATIENCE

    def on_iteration(solve: Solve) -> bool:
        return (int(solve.iterations) % EVERY == 0 and look(solve)) or ended()

    # Solve once, with a look every few iterations and one at the end.
    solved = system.solve(
        system.start,
        first,
        iterations=iterations,
        tolerance=tolerance,
        on_iteration=on_iteration,
        on_product=space.add if attempts > 1 else None,
    )
    if int(solved.iterations) % EVERY:
        look(solved)
    return best or Found(1.0, solved.x, math.inf, 0.0, int(solved.iterations))
