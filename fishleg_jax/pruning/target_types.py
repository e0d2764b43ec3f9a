"""Types of the targets that the functions of `targets` return."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fishleg_jax import _text


class Budget(NamedTuple):
    """Upper bound on what is kept: `weights`, `bytes`, `flops`, `seconds`, `time_share`, `cost`.

    Attributes:
        unit: The name of the function that returned it.
        at_most: Upper bound, in that unit.
        costs: Cost of each weight, for the unit `cost`; None otherwise.
    """

    unit: str
    at_most: float
    costs: Any | None = None

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Limit(NamedTuple):
    """Upper bound on a loss increase or a metric's drop, returned by `loss_increase` and `metric`.

    Attributes:
        unit: `measured` or `predicted` nats per example, or that of a `metric`.
        at_most: Upper bound, in that unit.
        metric: Function that measures the weights, for `metric`; None otherwise.
        highest: Highest sparsity to try.
        resolution: Difference in sparsity at which the search ends.
    """

    unit: str
    at_most: float
    metric: Callable[[Any], float] | None
    highest: float
    resolution: float

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Given(NamedTuple):
    """Masks to end at, returned by `masks`.

    Attributes:
        masks: Pytree of booleans like the parameters, False for pruned.
    """

    masks: Any

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


Target = Budget | Limit | Given
