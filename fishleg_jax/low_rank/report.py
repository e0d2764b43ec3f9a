"""Rows leaf by leaf of a decomposition, and their table."""

from typing import Any, NamedTuple

from fishleg_jax.low_rank.forms import Options
from fishleg_jax.pruning._tables import text_table


class Row(NamedTuple):
    """What became of one leaf.

    Attributes:
        name: Key path.
        form: `svd`, `channel`, `spatial` or `tucker2`; None for a leaf that stays whole.
        ranks: Its ranks; empty for a leaf that stays whole.
        weights: Number of weights before and after.
        flops: Operations per example before and after; 0 for leaves that are not kernels.
        loss: Predicted rise of the loss, in nats per example; with an identity for the metric, half
            the squared error.
        reason: Reason why the leaf stays whole; None for one that does not.
    """

    name: str
    form: str | None
    ranks: tuple[int, ...]
    weights: tuple[int, int]
    flops: tuple[float, float]
    loss: float
    reason: str | None

    @classmethod
    def whole(cls, name: str, leaf: Any, reason: str | None, flops: float = 0.0) -> "Row":
        """Row of a leaf that stays whole."""
        return cls(name, None, (), (leaf.size, leaf.size), (flops, flops), 0.0, reason)

    @classmethod
    def of(cls, name: str, leaf: Any, form: str, options: Options, index: int) -> "Row":
        """Row of a kernel with one of its options."""
        ranks = tuple(int(r) for r in options.ranks[index])
        weights = leaf.size, int(options.weights[index])
        flops = options.dense[1], float(options.flops[index])
        return cls(name, form, ranks, weights, flops, float(options.loss[index]), None)


class DecompositionReport(NamedTuple):
    """Report of `decompose`; print it.

    Attributes:
        rows: Row for every leaf, in the tree's order.
        metric: `fisher` or `identity`.
    """

    rows: tuple[Row, ...]
    metric: str

    @property
    def weights(self) -> tuple[int, int]:
        """Number of weights of all leaves, before and after."""
        return tuple(sum(row.weights[k] for row in self.rows) for k in (0, 1))

    @property
    def flops(self) -> tuple[float, float]:
        """Operations of all kernels per example, before and after."""
        return tuple(sum(row.flops[k] for row in self.rows) for k in (0, 1))

    @property
    def loss(self) -> float:
        """Predicted rise of the loss, summed over kernels; see `Row`."""
        return sum(row.loss for row in self.rows)

    def summary(self) -> str:
        """One line: weights and operations before and after."""
        before, after = self.weights
        return (
            f"weights {before:,} to {after:,}, flops {self.flops[0]:,.0f} to {self.flops[1]:,.0f}"
        )

    def __str__(self) -> str:
        """Table with a row for every kernel, and the other leaves below it."""
        title = "loss" if self.metric == "fisher" else "½ error²"
        head = ["leaf", "form", "ranks", "weights", "", "flops", "", title]
        cells = []
        for row in self.rows:
            if row.form is not None or row.flops[0]:
                cells.append(_cells(row))
        total = Row("total", "", (), self.weights, self.flops, self.loss, None)
        first, _, *others = text_table(head, [*cells, _cells(total)], texts=2)
        lines = [line.rstrip() for line in (first, *others)]
        rest = [f"{row.name}: {row.reason}" for row in self.rows if row.reason is not None]
        return "\n".join([*lines, *(["", "Whole:", *rest] if rest else [])])


def _cells(row: Row) -> list[str]:
    ranks = ", ".join(map(str, row.ranks))
    sizes = [f"{x:,.0f}" for x in (*row.weights, *row.flops)]
    return [row.name, row.form or "", ranks, *sizes, f"{row.loss:.3g}"]
