"""From stage to stage, until a pruning is where it was to go, or can't go on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fishleg_jax.fisher import Curvature
from fishleg_jax.pruning.one_shot.stage import Fitted, Plan, Point, advance, score


class Move(NamedTuple):
    """What a stage has come to.

    Attributes:
        point: the next point; that of before, where there is none.
        told: what the stage has to tell, with its `sparsity`; None where nothing was pruned.
        last: whether the pruning ends here.
        stopped: why, if that is not as asked for.
    """

    point: Point
    told: dict | None
    last: bool = False
    stopped: str | None = None


class Outcome(NamedTuple):
    """Where a walk ends: the last sound point, its state, what all stages told, what went wrong."""

    point: Point
    state: Any
    told: tuple[dict, ...]
    stopped: str | None


# of an inverse Fisher that is fitted, and of what the stages of before have told
Attempt = Callable[[Fitted, Sequence[dict]], Move]


def walk(
    plan: Plan,
    point: Point,
    stages: int,
    fit_at: Callable[[int, Point], tuple[Any, Curvature]],
    attempt: Attempt,
    tell: Callable[[Outcome], None] = lambda outcome: None,
    adapt_damping: bool = True,
) -> Outcome:
    """Fits and prunes, stage by stage.

    Args:
        plan: how.
        point: where it begins.
        stages: how many stages there are at most.
        fit_at: `(stage, point) -> (state, curvature)`.
        attempt: what a stage does with that.
        tell: called after every stage that has pruned, with what would be the end.
        adapt_damping: whether a stage begins with the damping that the compensation of the one
            before has found, where it has.

    Returns:
        The end, which is before a stage whose numbers are not finite.

    Raises:
        FloatingPointError: those of the first stage are not.
    """
    state, told, stopped, factor = None, [], None, 1.0  # a factor of the damping
    for stage in range(stages):
        try:
            fitted, curvature = fit_at(stage, point)
            if factor != 1:
                fitted = fitted._replace(damping=fitted.damping * factor)
            move = attempt(score(plan, point, fitted, curvature), told)
        except FloatingPointError as error:
            if stage == 0:
                raise
            stopped = (
                f"stage {stage + 1} of {stages} failed: {error}; the weights are those of the "
                f"stage before, at a sparsity of {told[-1]['sparsity']:.6g}"
            )
            break
        if state is None or move.told is not None:
            state = fitted
        point, stopped = move.point, move.stopped
        if move.told is not None:
            told.append(move.told)
            tell(Outcome(point, state, tuple(told), stopped))
        if move.last:
            break
        if adapt_damping and move.told.get("raised") is not None:
            factor *= move.told["raised"]
    return Outcome(point, state, tuple(told), stopped)


def by_schedule(plan: Plan, sparsities: Sequence[float]) -> Attempt:
    """Stages to sparsities that are known beforehand."""

    def attempt(fitted: Fitted, told: Sequence[dict]) -> Move:
        sparsity = sparsities[len(told)]
        point, info = advance(plan, fitted, sparsity)
        return Move(point, {"sparsity": sparsity} | info)

    return attempt
