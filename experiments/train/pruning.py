"""Pruning while a network is trained, behind an optimiser or with its own estimate."""

from functools import partial
from typing import Any, NamedTuple

import optax

import fishleg_jax as flj
from experiments.gradual.plans import AHEAD, BEGIN, END, START
from experiments.models.specs import Spec
from experiments.models.training import model_in_training

UPDATES = 50  # mask updates in a training, about
AUX_EVERY = 10  # steps between batches that a pruning's own estimate sees, as in gradual pruning
LEAST = 60  # steps of a training, in which that estimate is ready before the pruning ends


class Goal(NamedTuple):
    """A sparsity, and when it is reached.

    Attributes:
        sparsity: The final one.
        begin: Step of the first mask update.
        end: Step at which the final sparsity is reached.
        every: Steps between mask updates.
    """

    sparsity: float
    begin: int
    end: int
    every: int

    def due(self, step: int) -> bool:
        """Whether masks are updated at a step, counted from 1."""
        return step % self.every == 0 and self.begin <= step <= self.end


def make_goal(sparsity: float, steps: int) -> Goal:
    """A goal whose pruning takes from a tenth to seven tenths of the training.

    Args:
        sparsity: The final one.
        steps: Length of the training.

    Raises:
        ValueError: There are too few steps.
    """
    if steps < LEAST:
        raise ValueError(
            f"--prune {sparsity:g} takes {LEAST} steps or more, --epochs gives {steps}"
        )
    every = steps // UPDATES
    if every > AUX_EVERY:  # masks are updated where curvature is, which saves a compilation
        every -= every % AUX_EVERY
    begin, end = (int(part * steps / every) * every for part in (BEGIN, END))
    return Goal(sparsity, begin, end, every)


def _prune(spec: Spec, goal: Goal, **options: Any) -> optax.GradientTransformationExtraArgs:
    return flj.fishleg_prune(
        spec.model,
        flj.schedules.cubic(goal.sparsity, begin=goal.begin, end=goal.end),
        prunable=spec.prunable,
        mask_every=goal.every,
        training_model=model_in_training(spec),
        **options,
    )


def sharing(spec: Spec, goal: Goal) -> Any:
    """The argument `prune` of `fishleg_optimizer`, for a pruning with the optimiser's estimate.

    Args:
        spec: The model.
        goal: The goal.
    """
    return lambda shared: partial(_prune, spec, goal)(estimator=shared)


def behind(
    optimizer: optax.GradientTransformation, spec: Spec, goal: Goal
) -> optax.GradientTransformationExtraArgs:
    """An optimiser with a pruning behind it, which has an estimate of its own.

    Args:
        optimizer: The optimiser.
        spec: The model.
        goal: The goal.
    """
    return optax.chain(optimizer, _prune(spec, goal, aux_every=AUX_EVERY))


def work(goal: Goal, step: int) -> dict[str, bool]:
    """Arguments of the update of `behind`, chosen on the host as in gradual pruning.

    Args:
        goal: The goal.
        step: Number of the step, counted from 1.
    """
    before = goal.begin - AHEAD
    first = max(before, 0) + START
    sees = before < step <= goal.end and (step <= first or step % AUX_EVERY == 0)
    return {"assimilate": sees} if sees or goal.due(step) else {"hold": True}
