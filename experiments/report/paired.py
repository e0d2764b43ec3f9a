"""The difference of two networks on the same examples, and how sure it is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NORMAL = 1.96  # standard errors to either side, for 95 %


class Difference(NamedTuple):
    """A mean difference in percent, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Such as `+3.1 (+0.4 to +5.8)`."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Difference:
    """By how much one network is right more often than another.

    Args:
        ours: whether it is right, example by example.
        theirs: whether the other one is, on the same examples.

    Returns:
        The mean of the differences, and 1.96 of its standard errors to either side: paired, so that
        examples that are hard for both widen nothing.

    Raises:
        ValueError: there are not as many of the one as of the other, or fewer than two.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"two or more pairs are needed, got {len(ours)} and {len(theirs)} values")
    differences = 100 * (np.asarray(ours, float) - np.asarray(theirs, float))
    mean = differences.mean()
    error = NORMAL * differences.std(ddof=1) / np.sqrt(len(differences))
    return Difference(float(mean), float(mean - error), float(mean + error))
