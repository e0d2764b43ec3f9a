"""Schedules: sparsity as a function of the stage, or of the training step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._checks.numbers import is_number, is_whole


def _geometric(initial: float, final: float, part: float) -> float:
    # expm1 and log1p, as rounding next to 1 would show in small sparsities
    start, end = math.log1p(-initial), math.log1p(-final)
    return -math.expm1(start + (end - start) * part)


def _linear(initial: float, final: float, part: float) -> float:
    return initial + (final - initial) * part


def _polynomial(initial: float, final: float, part: float) -> float:
    return final + (initial - final) * (1 - part) ** 3


# (initial, final, part of the way) -> sparsity
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "geometric": _geometric,
    "linear": _linear,
    "polynomial": _polynomial,
}


def stage_sparsities(
    sparsity: float, stages: int, *, schedule: str = "geometric", initial: float = 0.0
) -> list[float]:
    """Sparsities after each stage of a pruning in several stages.

    With `s_0` the initial sparsity, `s` the final one and `n` stages, stage `k = 1…n` prunes to

    - `geometric`: `1 - (1 - s_0) · ((1 - s) / (1 - s_0))^(k/n)`: every stage keeps the same
      fraction of the remaining weights;
    - `linear`: `s_0 + (s - s_0) · k/n`: every stage prunes the same number of weights;
    - `polynomial`: `s + (s_0 - s) · (1 - k/n)³` (Zhu and Gupta 2017, equation 1): many at first,
      few at the end.

    Args:
        sparsity: Final fraction of zeros, in [0, 1).
        stages: Number of stages, at least 1.
        schedule: Growth of the sparsity: `geometric`, the default, `linear` or `polynomial`.
        initial: Fraction of zeros before the first stage, from 0 to the final one.

    Returns:
        A list with one non-decreasing sparsity for each stage; the last is exactly the final one.

    Raises:
        ValueError: A sparsity outside [0, 1), an initial one below 0 or above the final one, stages
            that are not a positive integer, an unknown schedule.

    Example:
        >>> from fishleg_jax.pruning.schedules import stage_sparsities
        >>> stage_sparsities(0.875, 3)
        [0.5, 0.75, 0.875]
        >>> stage_sparsities(0.75, 3, schedule="linear")
        [0.25, 0.5, 0.75]
    """
    if schedule not in tuple(SCHEDULES):
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULES)}, got {_text.shown(schedule)}"
        )
    if not is_whole(stages, 1):
        raise ValueError(f"stages must be an integer of at least 1, got {_text.shown(stages)}")
    final, start = _checked(sparsity, initial, "sparsity")
    parts = (k / int(stages) for k in range(1, stages))
    between = [_rounded(SCHEDULES[schedule](start, final, x)) for x in parts]
    # rounding must not lead beyond either end
    return [*(min(max(x, start), final) for x in between), final]


@dataclasses.dataclass(frozen=True)
class Cubic:
    """Cubic schedule that `cubic` returns: a function of the step.

    Attributes:
        final: Sparsity from `end` on.
        begin: First step at which weights are pruned.
        end: Step at which the final sparsity is reached.
        initial: Sparsity at `begin`.
    """

    final: float
    begin: int
    end: int
    initial: float = 0.0

    def __call__(self, step: Any) -> jax.Array:
        """Sparsity at a step, in float32; the step may be traced."""
        step = jnp.asarray(step)
        part = jnp.clip((step - self.begin) / (self.end - self.begin), 0, 1).astype(jnp.float32)
        value = _polynomial(self.initial, self.final, part)
        value = jnp.where(step >= self.end, self.final, value)
        return jnp.where(step >= self.begin, value, 0).astype(jnp.float32)


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> Cubic:
    """Sparsity `s_f + (s_0 - s_f) (1 - p)³`, with p the part of the way from `begin` to `end`.

    Many weights are pruned at first, when there are many to spare, and few at the end.

    Args:
        final: Sparsity `s_f` from step `end` on, in [0, 1).
        begin: Step before which nothing is pruned, from 0.
        end: Step at which the final sparsity is reached, after `begin`.
        initial: Sparsity `s_0` at `begin`, from 0, the default, to the final one.

    Returns:
        A function of the step, which may be traced; steps are counted from one.

    Raises:
        ValueError: An argument out of its range.

    References:
        Zhu & Gupta, To prune, or not to prune, 2017, equation 1.

    Example:
        >>> import fishleg_jax as flj
        >>> schedule = flj.schedules.cubic(0.8, begin=10, end=20)
        >>> [round(float(schedule(step)), 3) for step in (9, 10, 15, 20, 21)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    for name, value in (("begin", begin), ("end", end)):
        if not is_whole(value, 0):
            raise ValueError(
                f"{name} must be a step, an integer of at least 0, got {_text.shown(value)}"
            )
    if begin >= end:
        raise ValueError(f"end must be after begin, {begin}, got {end}")
    final, initial = _checked(final, initial, "final")
    return Cubic(final, int(begin), int(end), initial)


def _checked(sparsity: Any, initial: Any, argument: str) -> tuple[float, float]:
    """Final and initial sparsity as they are printed, or a ValueError."""
    if not _is_sparsity(sparsity):
        raise ValueError(f"{argument} must be a number in [0, 1), got {_text.shown(sparsity)}")
    final = _as_float(sparsity)
    if not _is_sparsity(initial) or _as_float(initial) > final:
        raise ValueError(
            f"initial must be a number from 0 to the final sparsity, {final}, got "
            f"{_text.shown(initial)}"
        )
    return final, _as_float(initial)


def _is_sparsity(x: Any) -> bool:
    return is_number(x) and bool(0 <= x < 1)


def _rounded(x: float) -> float:
    """Rounds to fifteen digits: of ten weights 0.5 less one bit would prune one fewer than 0.5."""
    return float(f"{x:.15g}")


def _as_float(x: Any) -> float:
    """Number as it is printed, as `make_masks` reads it: 0.9 in float32 is 0.9."""
    return float(Fraction(str(x)))


__all__: Sequence[str] = ("Cubic", "cubic", "stage_sparsities")


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
