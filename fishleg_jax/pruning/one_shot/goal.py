"""From what `prune_one_shot` is asked to reach to what its stages do."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fishleg_jax.model import BatchLike, Model
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.one_shot import budget, limit
from fishleg_jax.pruning.one_shot.stage import Goal, Plan, Scored, Step, advance
from fishleg_jax.pruning.schedules import stage_sparsities
from fishleg_jax.pruning.targets import Budget, Limit, Target


def sparsity_or_target(asked: float | Target, groups: Groups) -> float | Target:
    """A number of weights as the sparsity that it is; everything else as it came."""
    if not isinstance(asked, Budget) or asked.unit != "weights":
        return asked
    return budget.of_weights(asked.at_most, groups.sizes)


def planned(
    goal: float | Target, stages: int, schedule: str | Sequence[float], initial: float = 0.0
) -> list[float]:
    """The sparsities of all stages, as far as they are known beforehand: of a budget none.

    They go on from an initial sparsity, that of the masks of before.
    """
    if isinstance(schedule, Iterable) and not isinstance(schedule, str):
        return _given(goal, stages, schedule)
    final = goal
    if isinstance(goal, (Budget, Limit)):
        final = goal.highest if isinstance(goal, Limit) else initial
    (final,) = stage_sparsities(final, 1)  # checks it
    return stage_sparsities(final, stages, schedule=schedule, initial=min(initial, final))


def _given(goal: float | Target, stages: int, schedule: Sequence[float]) -> list[float]:
    """A schedule that is given stage by stage."""
    if isinstance(goal, (Budget, Limit)):
        raise ValueError("schedule must be a name where sparsity is a target, got sparsities")
    final = stage_sparsities(goal, stages)[-1]  # checks both
    try:
        sparsities = [stage_sparsities(s, 1)[0] for s in schedule]
    except ValueError:
        raise ValueError(f"schedule must be of numbers in [0, 1), got {schedule!r}") from None
    if len(sparsities) != stages or sparsities != sorted(sparsities) or sparsities[-1] != final:
        raise ValueError(
            f"schedule must be a name, or as many rising sparsities as stages={stages} that end at "
            f"sparsity={final:g}, got {sparsities}"
        )
    return sparsities


def goal_for(
    asked: float | Target,
    goal: float | Target,
    plan: Plan,
    model: Model,
    params: Any,
    batch: BatchLike,
    loss: Callable[[Any], Any] | None,
    sparsities: Sequence[float],
    schedule: str,
    before: int = 0,
) -> Goal:
    """The function that ends each stage on the way to a goal.

    Args:
        asked: what the user asked for.
        goal: the same as a sparsity, or a target that depends on the ranking or on what is lost.
        plan: how.
        model: the model.
        params: the weights that came in.
        batch: a batch, to count operations.
        loss: a function of the weights, for a limit that is measured.
        sparsities: those that are planned.
        schedule: by which the stages follow each other.
        before: Number of weights that the masks of before prune.

    Raises:
        ValueError: the goal can't be reached, as far as that is known before any stage.
    """
    if isinstance(goal, Budget):
        initial = budget.sparsity_of(before, plan.surgeon.groups.weights)
        return budget.within_budget(
            plan, goal, model, params, batch, len(sparsities), schedule, initial
        )
    if isinstance(goal, Limit):
        return limit.within_limit(plan, goal, params, loss, sparsities, before)
    scheduled = by_schedule(plan, sparsities)
    if isinstance(asked, Budget) and goal == 0:
        return lambda *args: scheduled(*args)._replace(stopped=budget.not_needed(asked))
    return scheduled


def by_schedule(plan: Plan, sparsities: Sequence[float]) -> Goal:
    """Stages to sparsities that are known beforehand."""

    def end(scored: Scored, reports: Sequence[dict]) -> Step:
        sparsity = sparsities[len(reports)]
        point, info = advance(plan, scored, sparsity)
        return Step(point, {"sparsity": sparsity} | info)

    return end
