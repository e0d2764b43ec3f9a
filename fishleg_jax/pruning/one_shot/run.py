"""Turns the arguments of `prune_one_shot`, once checked, into one value that its loop reads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fishleg_jax import _chunks, _prunable, _text
from fishleg_jax._batch import split_batch
from fishleg_jax._checks import arrays
from fishleg_jax._checks.numbers import check_count, is_number, is_whole
from fishleg_jax._same_model import check_same_model
from fishleg_jax.inverse.base import InverseFisher, check_on_host
from fishleg_jax.model import BatchLike, Model, check_all_targets, check_model
from fishleg_jax.pruning import _soundness
from fishleg_jax.pruning.compensation import _adjustable
from fishleg_jax.pruning.compensation._group import group
from fishleg_jax.pruning.compensation._independent import Compensation, independent
from fishleg_jax.pruning.leaves import Leaves, leaves_of
from fishleg_jax.pruning.masks.along import warn_of_axes
from fishleg_jax.pruning.masks.build import check_room
from fishleg_jax.pruning.masks.densities import Scope
from fishleg_jax.pruning.masks.groups import (
    already_pruned,
    first_masks,
    make_groups,
    zeros_in,
)
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.masks.targets import target_of
from fishleg_jax.pruning.one_shot import checks, given_masks, goal
from fishleg_jax.pruning.one_shot.budget import sparsity_of
from fishleg_jax.pruning.one_shot.data import Data
from fishleg_jax.pruning.one_shot.fit import fitted
from fishleg_jax.pruning.one_shot.held_out import SHARE, check_share, set_aside
from fishleg_jax.pruning.one_shot.result import Result
from fishleg_jax.pruning.one_shot.stage import Goal, Plan, Point, begin
from fishleg_jax.pruning.one_shot.stages import Stages
from fishleg_jax.pruning.one_shot.steps import by_steps
from fishleg_jax.pruning.report import make_report
from fishleg_jax.pruning.scores import Saliency, check_saliency
from fishleg_jax.pruning.selection._border import Selection
from fishleg_jax.pruning.target_types import Budget, Given, Limit, Target
from fishleg_jax.pruning.update import Surgeon


class Run(NamedTuple):
    """One-shot pruning with valid arguments.

    Attributes:
        plan: Choices that all stages share.
        goal: Function that ends a stage, from its scores.
        data: Batches and curvature of the stages.
        stages: How the stages run.
        start: Weights and masks before the first stage.
        started: Name and number of zeros of the leaves in which the first masks prune.
        key: Random key.
    """

    plan: Plan
    goal: Goal
    data: Data
    stages: Stages
    start: Point
    started: tuple[tuple[str, int], ...]
    key: jax.Array

    def fit(self, stage: int, point: Point, batches: Sequence[BatchLike], before: Any) -> Any:
        """State of the estimator at a point: fitted to batches, or the one given in `Stages`.

        An estimator that can carries the state of the stage before on.
        """
        if self.stages.state is not None:
            return self.stages.state
        surgeon = self.plan.surgeon
        key = self.key if self.stages.number == 1 else jax.random.fold_in(self.key, stage)
        # The estimate covers the free weights; it needs no mask if all are free.
        all_free = not self.started and surgeon.adjustable is None
        masks = None
        if stage > 0 or not all_free:
            masks = _adjustable.movable(point.masks, surgeon.adjustable, surgeon.groups)
        earlier = before if stage > 0 and surgeon.estimator.carry is not None else None
        state = fitted(
            surgeon.estimator, point.params, batches, key, masks, self.stages.on_update, earlier
        )
        _soundness.check_ready(surgeon.estimator, state)
        return state

    def result(
        self, point: Point, state: Any, reports: tuple[dict, ...], stopped: str | None
    ) -> Result:
        """Result of the pruning if it ends at a point."""
        try:
            constants = self.data.constants_after(len(reports), point.params)
        except FloatingPointError as error:  # the weights are still valid
            constants = None
            stopped = stopped or f"no constants for the weights after stage {len(reports)}: {error}"
        groups = self.plan.surgeon.groups
        report = make_report(
            *(point.removed, point.masks, groups.chosen, reports, stopped),
            *(groups.left_out, self.started, groups.remainders),
        )
        return Result(point.params, point.masks, report, state, reports, stopped, constants)


def checked(
    model: Model,
    params: Any,
    estimator: InverseFisher,
    batches: Sequence[BatchLike],
    *,
    sparsity: float | Target | None,
    stages: int | Stages | None,
    held_out: Sequence[BatchLike] | float | None,
    scope: Scope,
    saliency: Saliency,
    compensation: Compensation | None,
    selection: Selection | None,
    prunable: _prunable.LeafSelection | Leaves,
    masks: Any | None,
    key: jax.Array | None,
    pattern: Pattern | None = None,
) -> Run:
    """Checks the arguments of `prune_one_shot` and returns them as a run.

    Raises:
        ValueError: An argument that `prune_one_shot` rejects.
        FloatingPointError: Predictions or losses of the initial weights are not finite.
    """
    if not isinstance(stages, Stages):
        if stages is not None and not is_whole(stages, 1):
            raise ValueError(
                "stages must be an integer of at least 1, None, or flj.Stages(...), got "
                f"{_text.shown(stages)}"
            )
        stages = Stages(stages)
    leaves = leaves_of(prunable)
    # Check arrays, model and estimator.
    check_share(held_out)
    share, given = held_out, None if is_number(held_out) else held_out
    checks.check_host(params, batches, given, leaves.costs, stages.state, key)
    check_on_host(estimator)
    check_model(model)
    if estimator.model is not None:
        check_same_model(estimator.model, model, (params, batches))
    arrays.check_params(params)
    arrays.check_batches(batches)
    check_saliency(saliency, estimator)
    wanted = None
    if isinstance(sparsity, Given):
        others = {"scope": (scope, "global"), "selection": (selection, None)}
        wanted, leaves, sparsity, masks = given_masks.settle(
            sparsity, params, leaves, masks, pattern=(pattern, None), **others
        )
        saliency = "obs" if saliency == "auto" else saliency  # all choose the same weights
    # Settle what was left open: compensation, held-out data, number of stages.
    curved = estimator.updates != 0  # `identity` sees no data
    labelled = checks.have_labels(batches)
    if compensation is None:
        solvable = curved and labelled and model.likelihood.fisher is not None
        compensation = group() if solvable else independent(check_step=given is not None)
    else:
        checks.check_compensation(compensation)
    held_out = given
    measures = saliency == "auto" or getattr(compensation, "measures_loss", False)
    if is_number(share) and share and curved and labelled and measures and stages.state is None:
        batches, held_out = _set_aside(estimator, batches, share, stages)
    # Decide which weights are pruned: leaves, initial masks, sparsities.
    groups = make_groups(params, leaves.prunable, scope, leaves.stacked, pattern)
    warn_of_axes(groups, model, params, batches[0])
    sparsity = target_of(groups, sparsity)
    start = begin(params, first_masks(params, groups, masks))
    before = sum(map(int, jax.device_get(zeros_in(groups, start.masks))))
    final = goal.sparsity_or_target(sparsity, groups)
    initial = sparsity_of(before, groups.weights)
    if groups.fully_patterned and not isinstance(final, (Budget, Limit)):
        initial = min(initial, final)  # any zeros may lie within a pattern that asks for fewer
    chooses = stages.number is None and hasattr(compensation, "cheap") and stages.state is None
    chooses = chooses and curved and labelled and not isinstance(final, (Budget, Limit))
    chooses = chooses and isinstance(stages.schedule, str)
    if not chooses:
        stages = stages._replace(number=_default_number(stages))
    sparsities = goal.planned(
        final, 1 if stages.number is None else stages.number, stages.schedule, initial
    )
    if sparsities and not isinstance(final, Budget):
        check_room(groups, sparsities[-1], before)
    # Check selection, compensation and costs.
    if selection is not None:
        checks.check_selection(selection, groups, final)
    moves = _adjustable.decide(params, leaves.adjustable)
    _adjustable.check_compensation(compensation, moves)
    if leaves.costs is not None:
        arrays.check_costs(params, leaves.costs, groups.chosen)
    if key is None:
        key = jax.random.key(0)
    else:
        checks.check_key(key)
    per_stage = _checked_stages(stages, batches)
    number = stages.most if chooses else stages.number
    stages = stages._replace(number=number)
    # Check that estimate, model and data match.
    surgeon = Surgeon(estimator, compensation, groups, moves, saliency)
    plan = Plan(surgeon, leaves.costs, selection, wanted=wanted)
    _check_data(plan, model, params, batches, held_out, stages, per_stage)
    labelled = checks.have_labels(batches if held_out is None else held_out)
    plan = plan._replace(measure=stages.number > 1 and estimator.updates != 0 and labelled)
    data = Data(model, batches, held_out, stages, per_stage)
    if plan.measure or plan.first_order or getattr(compensation, "measures_loss", False):
        _soundness.check_losses(data.curvature_on, params, batches, "batches")
        _soundness.check_losses(data.curvature_on, params, held_out or [], "held_out")
    # Choose the function that ends each stage.
    loss = data.loss if labelled else None
    if chooses:
        reach = by_steps(plan, final, stages.most, initial)
    else:
        reach = goal.goal_for(
            *(sparsity, final, plan, model, params, batches[0], loss, sparsities),
            *(stages.schedule, before),
        )
    started = already_pruned(groups, start.masks)
    return Run(plan, reach, data, stages, start, started, key)


def _set_aside(
    estimator: InverseFisher, batches: Sequence[BatchLike], share: float, stages: Stages
) -> tuple[Sequence[BatchLike], Sequence[BatchLike] | None]:
    """Batches for the curvature and for the loss; all for the curvature if a fit needs them.

    Raises:
        ValueError: Another share than the default, which can't be set aside.
    """
    first, second = set_aside(batches, share)
    per_stage = len(first) if stages.batches_per_stage is None else stages.batches_per_stage
    problem = None if second else "there are too few examples"
    try:
        checks.check_per_stage(per_stage, len(first))
        _soundness.check_enough(estimator, first, stages.number or 1, per_stage)
    except ValueError as error:
        problem = f"of what is left then {error}"
    if problem is None:
        return first, second
    if share != SHARE:
        raise ValueError(f"held_out={share:g} can't be set aside from the batches: {problem}")
    return batches, None


def _default_number(stages: Stages) -> Any:
    """Number of stages: as given, or as many as the schedule has sparsities, or one."""
    if stages.number is not None:
        return stages.number
    several = isinstance(stages.schedule, Sequence) and not isinstance(stages.schedule, str)
    return max(len(stages.schedule), 1) if several else 1


def _checked_stages(stages: Stages, batches: Sequence[BatchLike]) -> int:
    """Number of batches of each stage, once the fields of `Stages` are checked."""
    check_count(stages.most, "most")
    checks.check_functions(
        recalibrate=stages.recalibrate, on_update=stages.on_update, on_stage=stages.on_stage
    )
    _chunks.check_chunk(stages.examples_per_chunk)
    if stages.recalibrate is not None and not split_batch(batches[0])[2]:
        raise ValueError(
            "recalibrate needs batches with constants, (inputs, targets, constants), got "
            "(inputs, targets)"
        )
    return checks.check_per_stage(stages.batches_per_stage, len(batches))


def _check_data(
    plan: Plan,
    model: Model,
    params: Any,
    batches: Sequence[BatchLike],
    held_out: Sequence[BatchLike] | None,
    stages: Stages,
    per_stage: int,
) -> None:
    """Raises if estimate, model and data do not match."""
    estimator = plan.surgeon.estimator
    if stages.state is None:
        _soundness.check_enough(estimator, batches, stages.number, per_stage)
    if estimator.updates != 0:
        checks.check_model(model, params, batches[0])
        _soundness.check_single_examples(estimator, model, params, batches)
    checks.check_state(stages, estimator, params)
    if held_out is not None:
        arrays.check_batches(held_out, "held_out", like=batches[0])
    check_all_targets(model, params, batches, "batches")
    check_all_targets(model, params, held_out or (), "held_out")
    checks.check_needs(
        plan.surgeon.compensation, estimator, model, params, batches, held_out, plan.first_order
    )
