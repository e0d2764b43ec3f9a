"""Numbers leaf by leaf of what was pruned, and tables of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax.pruning._tables import html_table, paragraph, text_table

# of the table of stages; the first ones are there for every stage
COLUMNS = ("sparsity", "predicted", "actual", "held_out", "lost", "cost")
COLUMNS += ("ratio", "step", "damping")
OPTIONAL = COLUMNS[2:]
HEAD = ("leaf", "shape", "weights", "kept", "sparsity", "share of predicted increase")
NAMED = 3  # leaves that are left out for one reason and named in the text


class Row(NamedTuple):
    """One leaf, or the total.

    Attributes:
        name: the leaf's key path.
        shape: its shape; of the total, empty.
        weights: how many weights it has.
        kept: how many of them are kept.
        sparsity: the share of them that is pruned, in [0, 1].
        predicted: the sum of the scores of those that this pruning removed, in nats per example
            (for `inverse.identity`, half their squared magnitude).
        share: `predicted` over that of all leaves.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    sparsity: float
    predicted: float
    share: float


class Report(NamedTuple):
    """A row for every prunable leaf, and their total.

    `str` makes tables of it, a notebook shows them, and `to_dict` makes plain numbers.

    Attributes:
        rows: a row for every prunable leaf.
        total: their total.
        stages: One dictionary for every stage, see `Result`.
        stopped: what went wrong, see `Result`.
        left_out: Name, shape and reason of every leaf that is not prunable.
        started: Name and number of zeros of every leaf in which the masks of before prune.
    """

    rows: tuple[Row, ...]
    total: Row
    stages: tuple[dict[str, Any], ...] = ()
    stopped: str | None = None
    left_out: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    started: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        """One line, and a second one where the pruning stopped."""
        return brief(self, "Report")

    def __str__(self) -> str:
        """A table of the leaves, one of the stages if there is more to say, and the stop."""
        table = text_table(HEAD, self._lines(), texts=2)
        parts = ["\n".join([*table[:-1], table[1], table[-1]])]
        if self._first_lines():
            parts.insert(0, "\n".join(self._first_lines()))
        if self._has_stages():
            parts.append(stage_table(self.stages))
        if self.stopped is not None:
            parts.append(f"Stopped: {self.stopped}")
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """The same tables for a notebook."""
        parts = [paragraph(line) for line in self._first_lines()]
        parts.append(html_table(HEAD, self._lines(), texts=2))
        if self._has_stages():
            parts.append(html_table(*_stage_cells(self.stages), texts=1))
        if self.stopped is not None:
            parts.append(paragraph(f"Stopped: {self.stopped}"))
        return "".join(parts)

    def summary(self) -> str:
        """Sparsity, kept weights and number of leaves and stages, in one line.

        Returns:
            A text such as `sparsity 90.00%, kept 12 of 120 weights in 2 leaves, 3 stages`.

        Example:
            >>> total = Row("total", (), 120, 12, 0.9, 0.5, 1.0)
            >>> Report((total._replace(name="kernel", shape=(10, 12)),), total).summary()
            'sparsity 90.00%, kept 12 of 120 weights in 1 leaf'
        """
        total = self.total
        parts = [
            f"sparsity {total.sparsity:.2%}",
            f"kept {total.kept:,} of {_number(total.weights, 'weight')} in "
            + _number(len(self.rows), "leaf", "leaves"),
        ]
        if self.left_out:
            parts.append(f"{_number(len(self.left_out), 'leaf', 'leaves')} left out")
        if self.stages:
            parts.append(_number(len(self.stages), "stage"))
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The report in numbers, texts, lists and dictionaries of Python, ready for JSON.

        Returns:
            A dictionary with the keys `rows`, `total`, `stages`, `stopped`, `left_out` and
            `started`; what is not a finite number is None.

        Example:
            >>> total = Row("total", (), 4, 2, 0.5, float("nan"), 0.0)
            >>> Report((), total).to_dict()["total"]["predicted"] is None
            True
        """
        return {
            "rows": [_plain(row._asdict()) for row in self.rows],
            "total": _plain(self.total._asdict()),
            "stages": _plain(self.stages),
            "stopped": self.stopped,
            "left_out": [
                {"name": name, "shape": _plain(shape), "reason": reason}
                for name, shape, reason in self.left_out
            ],
            "started": [{"name": name, "zeros": zeros} for name, zeros in self.started],
        }

    def _lines(self) -> list[tuple[str, ...]]:
        """The cells of every leaf, and of the total."""
        lines = []
        for row in (*self.rows, self.total):
            shape = "×".join(map(str, row.shape))
            cells = (f"{row.weights:,}", f"{row.kept:,}", f"{row.sparsity:.2%}", f"{row.share:.2%}")
            lines.append((row.name, shape, *cells))
        return lines

    def _first_lines(self) -> list[str]:
        """A line for every reason to leave leaves out, and one for the zeros of before."""
        by_reason: dict[str, list[tuple[str, int]]] = {}
        for name, shape, reason in self.left_out:
            by_reason.setdefault(reason, []).append((name, math.prod(shape)))
        lines = []
        for reason, leaves in by_reason.items():
            names = ", ".join(name for name, _ in leaves[:NAMED])
            more = f" and {len(leaves) - NAMED} more" if len(leaves) > NAMED else ""
            counts = f"{_number(len(leaves), 'leaf', 'leaves')}, " + _number(
                sum(size for _, size in leaves), "weight"
            )
            lines.append(f"Left out ({reason}): {counts}: {names}{more}")
        if self.started:
            names = ", ".join(f"{name} ({zeros:,})" for name, zeros in self.started[:NAMED])
            more = f" and {len(self.started) - NAMED} more" if len(self.started) > NAMED else ""
            total = _number(sum(zeros for _, zeros in self.started), "weight")
            lines.append(f"Pruned before and held: {total}: {names}{more}; masks=None frees them")
        return lines

    def _has_stages(self) -> bool:
        """Whether the stages say more than the rows."""
        return len(self.stages) > 1 or any(set(stage) & set(OPTIONAL) for stage in self.stages)


def brief(report: Report, name: str) -> str:
    """The repr of a report, or of another value that has one: a line, and another for the stop."""
    end = "" if report.stopped is None else f"\nStopped: {report.stopped}"
    return f"{name}({report.summary()}){end}"


def stage_table(stages: Sequence[dict[str, Any]]) -> str:
    """A line for every stage of a pruning: what was predicted, and what came of it.

    Args:
        stages: those of a `Result`.

    Returns:
        The sparsity after every stage; the predicted and the actual increase of the loss in it, in
        nats per example; and what else its compensation tells.  What is not known is left out.

    Example:
        >>> print(stage_table([{"sparsity": 0.5, "predicted": 0.01, "actual": 0.02}]))
        stage  sparsity  predicted  actual
        ----------------------------------
        1        50.00%       0.01    0.02
    """
    return "\n".join(text_table(*_stage_cells(stages), texts=1))


def _stage_cells(
    stages: Sequence[dict[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the cells of the table of stages, without columns that nobody knows."""
    columns = [c for c in COLUMNS if any(stage.get(c) is not None for stage in stages)]

    def cell(stage, column):
        value = stage.get(column)
        if value is None:
            return ""
        return f"{value:.2%}" if column == "sparsity" else f"{value:.3g}"

    lines = [(str(i), *(cell(s, c) for c in columns)) for i, s in enumerate(stages, 1)]
    return ("stage", *columns), lines


def _number(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _plain(value: Any) -> Any:
    """A value in types of Python that JSON knows; NaN and infinity are None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and jax
        return _plain(value.tolist())
    if isinstance(value, Iterable):
        return [_plain(inner) for inner in value]
    return str(value)


def removed_scores(scores: Any, old_masks: Any, masks: Any) -> Any:
    """For every leaf the sum of the scores of the weights that masks newly prune."""
    return jax.tree.map(
        lambda s, old, new: jnp.sum(jnp.where(old & ~new, s, 0)), scores, old_masks, masks
    )


def make_report(
    removed: Any,
    masks: Any,
    chosen: list[bool],
    stages: tuple[dict[str, Any], ...] = (),
    stopped: str | None = None,
    left_out: tuple[tuple[str, tuple[int, ...], str], ...] = (),
    started: tuple[tuple[str, int], ...] = (),
) -> Report:
    """Counts what masks keep, beside the scores of what was pruned.

    Args:
        removed: a number for every leaf, of one `removed_scores` or the sum of several.
        masks: masks after the pruning.
        chosen: which leaves are prunable.
        stages: One dictionary for every stage.
        stopped: what went wrong.
        left_out: Name, shape and reason of every leaf that is not prunable.
        started: Name and number of zeros of every leaf in which the masks of before prune.
    """
    kept = jax.tree.map(jnp.sum, masks)
    parts = zip(
        _tree.named_leaves(masks),
        jax.tree.leaves(kept),
        jax.tree.leaves(removed),
        chosen,
        strict=True,
    )
    numbers = [
        (name, mask.shape, mask.size, int(count), float(loss))
        for (name, mask), count, loss, yes in parts
        if yes
    ]
    total = sum(n[4] for n in numbers)

    def row(name, shape, weights, count, loss):
        sparsity = 1 - count / weights if weights else 0.0
        return Row(name, shape, weights, count, sparsity, loss, loss / total if total else 0.0)

    rows = tuple(row(*n) for n in numbers)
    sums = (sum(r.weights for r in rows), sum(r.kept for r in rows), total)
    return Report(rows, row("total", (), *sums), stages, stopped, left_out, started)
