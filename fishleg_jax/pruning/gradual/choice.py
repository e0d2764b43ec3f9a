"""Choice between scores, dampings and a compensation at a mask update, by the step's loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax._devices import axis, sharding
from fishleg_jax.inverse.base import InverseFisher, movable_damping
from fishleg_jax.pruning import _paired
from fishleg_jax.pruning.scores import label

DAMPINGS = (10.0, 100.0)  # multiples of the estimate's own damping that are tried
MARGIN = 4.0  # standard errors of the paired difference by which a winner beats magnitude


class Candidate(NamedTuple):
    """Scores to try, and whether to compensate for the pruned weights.

    Attributes:
        saliency: Name of the scores.
        factor: Damping relative to the estimate's own.
        compensated: Whether the compensation changes the kept weights.
    """

    saliency: str
    factor: float = 1.0
    compensated: bool = False

    def __str__(self) -> str:
        """Name, with the damping if it is not the estimate's own."""
        return label(self.saliency, self.factor) + (" compensated" if self.compensated else "")


class Attempt(NamedTuple):
    """New masks, the changes of the weights with and without compensation, and their soundness.

    Attributes:
        masks: Extended masks.
        deltas: Changes of the weights without and with a compensation, stacked.
        sound: Whether the numbers of each are finite, of shape (2,).
    """

    masks: Any
    deltas: Any
    sound: jax.Array


class Choice(NamedTuple):
    """The winner of a mask update.

    Attributes:
        masks: Its masks.
        delta: Its change of the weights.
        sound: Whether any candidate had finite numbers and a finite loss.
        index: Its place among `candidates`.
    """

    masks: Any
    delta: Any
    sound: jax.Array
    index: jax.Array


def scores_to_try(estimator: InverseFisher, estimate: Any) -> list[tuple[str, float]]:
    """Scores and relative dampings that an estimate can give, the safest first."""
    found = [("magnitude", 1.0)]
    if estimator.updates == 0:
        return found
    if estimator.fisher_diagonal is not None:
        found += [("mixture", 1.0), ("obd", 1.0)]
    if movable_damping(estimate):
        found += [("obs", factor) for factor in reversed(DAMPINGS)]
    return [*found, ("obs", 1.0)]


def candidates(estimator: InverseFisher, estimate: Any) -> list[Candidate]:
    """Candidates in the order in which they are compared, magnitude alone first."""
    return [
        Candidate(*scores, compensated)
        for scores in scores_to_try(estimator, estimate)
        for compensated in (False, True)
    ]


def lowest(
    attempt: Callable[[jax.Array], Attempt],
    number: int,
    each: Callable[[Any], jax.Array],
    target: Any,
    old: Any,
    axis_name: str | None,
) -> Choice:
    """Compares candidates by their losses on the step's examples.

    Of those whose loss is lower than the first one's, magnitude's, by `MARGIN` standard errors of
    the paired difference, the one with the lowest mean wins; the first one, if there is none.  A
    loss that is not finite never wins, nor is it compared with.

    Args:
        attempt: Function of the index of scores that returns an `Attempt`.
        number: Number of scores.
        each: Function `(params) -> losses` of the step's examples, those of this device.
        target: Weights before the mask update.
        old: Masks before.
        axis_name: Named axis of devices, each with its own examples; None for one device.
    """
    shape = jax.eval_shape(each, target)
    start = (
        old,
        jax.tree.map(jnp.zeros_like, target),
        axis.varying(sharding.zeros(shape), axis_name),
        jnp.asarray(jnp.inf, shape.dtype),
        jnp.array(-1, jnp.int32),
    )

    def compare(best, index):
        tried = attempt(index)

        def challenge(best, challenger):
            *_, first_losses, lowest_mean, winner = best
            delta, sound, compensated = challenger
            losses = each(jax.tree.map(jnp.add, target, delta))
            sound &= axis.everywhere(jnp.all(jnp.isfinite(losses)), axis_name)
            mean = axis.mean(losses.mean(), axis_name)
            first = winner < 0
            better = _paired.better(MARGIN, [losses], [first_losses], axis_name)
            wins = sound & (first | (better & (mean < lowest_mean)))
            reference = jnp.where(first, losses, first_losses)
            new = tried.masks, delta, reference, mean, (2 * index + compensated).astype(jnp.int32)
            return optax.tree.where(wins, new, best), None

        flags = jnp.arange(2)
        return jax.lax.scan(challenge, best, (tried.deltas, tried.sound, flags))[0], None

    (masks, delta, _, _, index), _ = jax.lax.scan(compare, start, jnp.arange(number))
    return Choice(masks, delta, index >= 0, jnp.maximum(index, 0))
