"""Report of the predictions in which two networks differ."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fishleg_jax import _text
from fishleg_jax.pruning._tables import text_table

KINDS = ("mismatched", "lost", "gained")


class Group(NamedTuple):
    """Numbers of the predictions with one class, or with values in one interval.

    Attributes:
        low: Lowest value in the group; the class for a group of one class.
        high: Highest value in the group; the class for a group of one class.
        examples: Number of predictions.
        mismatches: Number of predictions in which the networks differ.
        lost: Number of those that only the dense network has right; None without labels.
        gained: Number of those that only the pruned network has right; None without labels.
    """

    low: float
    high: float
    examples: int
    mismatches: int
    lost: int | None
    gained: int | None

    @property
    def rate(self) -> float:
        """Fraction of the predictions that differ, in [0, 1]."""
        return self.mismatches / self.examples


class Disagreement(NamedTuple):
    """Predictions in which two networks differ, as `disagreement` returns them; print it.

    Attributes:
        examples: Number of predictions.
        mismatches: Number of predictions in which the networks differ.
        lost: Number of those that only the dense network has right; None without labels.
        gained: Number of those that only the pruned network has right; None without labels.
        accuracies: Accuracy of the dense and of the pruned network, in [0, 1]; None without labels.
        calibration: Expected calibration error of the dense and of the pruned network, in [0, 1];
            None without labels.
        classes: Group of every class that occurs: of the label, or without labels of the class that
            the dense network predicts.
        margins: Groups of equal size by the margin of the dense network, in nats: the distance of
            its two highest logits.
        memorised: Groups by the memorisation score, of the predictions whose score is known; None
            without scores.  Equal scores share one group.
        memorised_excess: Mean score of the predictions that differ minus that of all others, and
            its standard error; None without scores, or if either set has fewer than two that are
            known.
        predictions: Predicted classes of the dense and of the pruned network, two arrays of shape
            (predictions,).
        targets: Labels, shape (predictions,); None without labels.
        dense_margins: Margin of the dense network, shape (predictions,), in nats.
        positions: Place of each prediction among the labels of all batches, shape (predictions,),
            int; they skip padding.
    """

    examples: int
    mismatches: int
    lost: int | None
    gained: int | None
    accuracies: tuple[float, float] | None
    calibration: tuple[float, float] | None
    classes: tuple[Group, ...]
    margins: tuple[Group, ...]
    memorised: tuple[Group, ...] | None
    memorised_excess: tuple[float, float] | None
    predictions: tuple[np.ndarray, np.ndarray]
    targets: np.ndarray | None
    dense_margins: np.ndarray
    positions: np.ndarray

    @property
    def rate(self) -> float:
        """Fraction of the predictions that differ, in [0, 1]."""
        return self.mismatches / self.examples

    @property
    def unscored(self) -> int:
        """Number of predictions whose memorisation score is unknown; 0 without scores."""
        if self.memorised is None:
            return 0
        return self.examples - sum(group.examples for group in self.memorised)

    @property
    def error(self) -> float:
        """Standard error of `rate` as an estimate for new examples: that of a binomial."""
        return (self.rate * (1 - self.rate) / self.examples) ** 0.5

    def where(self, kind: str = "mismatched") -> np.ndarray:
        """Indices of the predictions that differ, those with the largest dense margin first.

        Args:
            kind: `mismatched` (default) for all of them, `lost` for those that only the dense
                network has right, `gained` for those that only the pruned one has right.

        Returns:
            Indices into `predictions`, `targets`, `dense_margins` and `positions`, shape (found,),
            int.  They count in the order of the batches, without padding.

        Raises:
            ValueError: An unknown kind, or `lost` and `gained` without labels.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {_text.shown(kind)}")
        dense, pruned = self.predictions
        chosen = dense != pruned
        if kind != "mismatched":
            if self.targets is None:
                raise ValueError(f"kind must be 'mismatched' for batches without labels: {kind!r}")
            chosen = chosen & ((dense if kind == "lost" else pruned) == self.targets)
        found = np.flatnonzero(chosen)
        return found[np.argsort(-self.dense_margins[found], kind="stable")]

    def __repr__(self) -> str:
        """One line, without the arrays."""
        return f"Disagreement({self.summary()})"

    def __str__(self) -> str:
        """The summary, calibration, and a table each by class, margin and memorisation."""
        lines = [self.summary()]
        if self.calibration is not None:
            before, after = self.calibration
            lines.append(f"calibration error {before:.4f} dense, {after:.4f} pruned")
        parts = ["\n".join(lines), _table("class", self.classes, whole=True)]
        parts.append(_table("margin, nats", self.margins))
        if self.memorised is not None:
            parts.append(_table("memorisation", self.memorised))
            if self.unscored:
                parts.append(f"{self.unscored:,} predictions without a score are left out of these")
        if self.memorised_excess is not None:
            mean, error = self.memorised_excess
            parts.append(
                f"predictions that differ are memorised by {mean:+.4f} more (standard error "
                f"{error:.4f})"
            )
        return "\n\n".join(parts)

    def summary(self) -> str:
        """Number of predictions that differ, and the accuracies, in one line.

        Returns:
            A text such as `3 of 100 differ (3.00 %): 2 lost, 1 gained; accuracy 98.00 to 97.00 %`.
        """
        text = f"{self.mismatches:,} of {self.examples:,} differ ({100 * self.rate:.2f} %)"
        if self.accuracies is None:
            return text
        before, after = (f"{100 * x:.2f}" for x in self.accuracies)
        return f"{text}: {self.lost} lost, {self.gained} gained; accuracy {before} to {after} %"


def _table(title: str, groups: Sequence[Group], whole: bool = False) -> str:
    labelled = groups[0].lost is not None
    head = [title, "examples", "differ", "%", *(["lost", "gained"] if labelled else [])]
    lines = []
    for group in groups:
        name = f"{group.low:g}" if whole else f"{group.low:.3g} to {group.high:.3g}"
        cells = [name, f"{group.examples:,}", f"{group.mismatches:,}", f"{100 * group.rate:.2f}"]
        lines.append([*cells, *([str(group.lost), str(group.gained)] if labelled else [])])
    return "\n".join(text_table(head, lines, texts=1))


def group_by(
    index: np.ndarray,
    values: np.ndarray,
    mismatched: np.ndarray,
    lost: np.ndarray | None,
    gained: np.ndarray | None,
) -> tuple[Group, ...]:
    """Counts the predictions of every group that occurs.

    Args:
        index: Number of the group of each prediction.
        values: Value of each prediction that the groups are named by.
        mismatched: Whether the networks differ.
        lost: Whether only the dense network is right; None without labels.
        gained: Whether only the pruned network is right; None without labels.
    """
    groups = []
    for i in np.unique(index):
        own = index == i
        counts = [None if x is None else int(x[own].sum()) for x in (mismatched, lost, gained)]
        ends = float(values[own].min()), float(values[own].max())
        groups.append(Group(*ends, int(own.sum()), *counts))
    return tuple(groups)


def quantile_index(values: np.ndarray, number: int) -> np.ndarray:
    """Numbers of at most `number` groups, of equal size as far as equal values can share one."""
    unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    index = np.zeros(len(unique), int)
    group, inside, left = 0, 0, len(values)
    for i, count in enumerate(counts):
        # a group is full once it has its share of what the groups before it have left
        if inside and inside + count / 2 > left / (number - group):
            group, inside, left = min(group + 1, number - 1), 0, left - inside
        index[i] = group
        inside += count
    return index[inverse]
