"""The difference of two networks on the same examples, and how sure it is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NORMAL = 1.96  # standard errors to either side, for 95 %


class Difference(NamedTuple):
    """A mean difference, in percent or in nats, and its 95 % interval."""

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


def loss_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
    """By how much the loss of one method is higher than another's, over examples and seeds.

    Args:
        ours: losses example by example, `(seeds, examples)`.
        theirs: those of the other method, for the same seeds and examples.

    Returns:
        The mean of the differences in nats, and 1.96 standard errors to either side: of the
        examples, whose differences are averaged over seeds, and, where there are several, of the
        seeds, whose differences are averaged over examples.

    Raises:
        ValueError: the shapes differ, or there are fewer than two examples.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] < 2:
        raise ValueError(
            "two arrays (seeds, examples) with two or more examples are needed, got shapes "
            f"{ours.shape} and {theirs.shape}"
        )
    differences = ours - theirs
    seeds, examples = differences.shape
    variance = differences.mean(axis=0).var(ddof=1) / examples
    if seeds > 1:
        variance += differences.mean(axis=1).var(ddof=1) / seeds
    mean, error = differences.mean(), NORMAL * np.sqrt(variance)
    return Difference(float(mean), float(mean - error), float(mean + error))
