"""Learning rates, chosen for every optimiser by the same trials on held-out training examples."""

import math
from typing import Any, NamedTuple

from experiments.data import datasets
from experiments.models import training
from experiments.train.steps import Program

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
HELD_OUT, SHARE = 5000, 10  # the last examples are held out: a tenth, at most HELD_OUT
TRIAL_EPOCHS, TRIAL_STEPS = 2, 300  # length of a trial: epochs, and steps at most
SEED = 0  # of all trials


class Trials(NamedTuple):
    """How learning rates are tried, the same for all optimisers.

    Attributes:
        rates: The grid.
        steps: Length of a trial, with a schedule of that length.
        held_out: Number of training examples at the end that trials are judged by.
    """

    rates: tuple[float, ...]
    steps: int
    held_out: int

    @property
    def settings(self) -> dict[str, Any]:
        """The trials for a `results.json`."""
        return {
            "trial_rates": list(self.rates),
            "trial_steps": self.steps,
            "held_out": self.held_out,
        }


def make_trials(
    train: datasets.Arrays, batch: int, rates: tuple[float, ...], steps: int | None
) -> Trials:
    """The trials of a data set.

    Args:
        train: Training inputs and targets.
        batch: Examples in a step.
        rates: The grid.
        steps: Length of a trial; None for two epochs and at most 300 steps.

    Raises:
        ValueError: The examples that are not held out do not make a batch.
    """
    examples = len(train[0])
    held_out = min(examples // SHARE, HELD_OUT)
    if examples - held_out < batch:
        raise ValueError(
            f"--batch-size {batch}: {examples - held_out} training examples are left beside the "
            f"{held_out} that are held out for the choice of learning rates"
        )
    usual = min(TRIAL_EPOCHS * (examples // batch), TRIAL_STEPS)
    return Trials(rates, steps or usual, held_out)


def try_rate(program: Program, train: datasets.Arrays, trials: Trials, rate: float) -> float:
    """The mean loss on the held-out examples after a short training, in nats; NaN if it diverged.

    Args:
        program: Compiled steps of the optimiser.
        train: Training inputs and targets; the last ones are held out.
        trials: How rates are tried.
        rate: The learning rate.
    """
    spec, cut = program.spec, len(train[0]) - trials.held_out
    seen, held_out = ([part[at] for part in train] for at in (slice(cut), slice(cut, None)))
    start = program.start(SEED)
    numbers = range(1, trials.steps + 1)
    done = program.run(tuple(seen), start, numbers, rate=rate, length=trials.steps, seed=SEED)
    if done.diverged:
        return math.nan
    params, constants, _ = done.carry
    return training.evaluate(spec.model, params, tuple(held_out), constants, spec.mean)[1]


def best(losses: dict[float, float | None]) -> float:
    """The rate with the lowest loss.

    Args:
        losses: Held-out losses by rate; None or NaN where the training diverged.

    Raises:
        ValueError: All of them diverged.
    """
    sound = {r: x for r, x in losses.items() if x is not None and math.isfinite(x)}
    if not sound:
        raise ValueError(f"training diverged at all rates tried: {', '.join(map(str, losses))}")
    return min(sound, key=sound.get)
