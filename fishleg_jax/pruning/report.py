"""Numbers of a pruning leaf by leaf, and tables of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._jit import jitted
from fishleg_jax.pruning._tables import html_table, paragraph, text_table

# columns of the table of stages; the first two are known for every stage
COLUMNS = ("sparsity", "predicted", "actual", "held_out", "lost", "cost")
COLUMNS += ("ratio", "step", "damping", "saliency")
OPTIONAL = COLUMNS[2:]
HEAD = ("leaf", "shape", "weights", "kept", "sparsity", "share of predicted increase")
NAMED = 3  # number of leaves to name for each reason of leaving leaves out


class Row(NamedTuple):
    """Numbers of one leaf, or of the total.

    Attributes:
        name: Key path of the leaf.
        shape: Shape of the leaf; empty for the total.
        weights: Number of weights.
        kept: Number of weights that are kept.
        sparsity: Fraction of weights that is pruned, in [0, 1].
        predicted: Sum of the scores of the weights that this pruning removed, in nats per example
            (for `inverse.identity`, half their squared magnitude).
        share: Share of `predicted` in the sum over all leaves.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    sparsity: float
    predicted: float
    share: float


class Report(NamedTuple):
    """Row for every prunable leaf, and their total.

    `str` formats tables, a notebook shows them, and `to_dict` returns plain numbers.

    Attributes:
        rows: Row for every prunable leaf.
        total: Total of the rows.
        stages: Dictionary of numbers for every stage, as in `Result`.
        stopped: Reason of a stop that was not requested, as in `Result`; None otherwise.
        left_out: Name, shape and reason of every leaf that is not prunable.
        started: Name and number of zeros of every leaf in which the initial masks prune.
        remainders: Name and number of weights of every leaf that a pattern leaves dense, because it
            does not divide the leaf.
    """

    rows: tuple[Row, ...]
    total: Row
    stages: tuple[dict[str, Any], ...] = ()
    stopped: str | None = None
    left_out: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    started: tuple[tuple[str, int], ...] = ()
    remainders: tuple[tuple[str, int], ...] = ()

    def __repr__(self) -> str:
        """Returns one line, and a second one if the pruning stopped."""
        return brief(self, "Report")

    def __str__(self) -> str:
        """Table of the leaves, one of the stages if they add anything, and the reason of a stop."""
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
        """Formats the same tables for a notebook."""
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
        """Converts the report to Python numbers, strings, lists and dictionaries, ready for JSON.

        Returns:
            A dictionary with the keys `rows`, `total`, `stages`, `stopped`, `left_out`, `started`
            and `remainders`; numbers that are not finite are None.

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
            "remainders": [{"name": name, "weights": left} for name, left in self.remainders],
        }

    def _lines(self) -> list[tuple[str, ...]]:
        """Cells of every leaf, and of the total."""
        lines = []
        for row in (*self.rows, self.total):
            shape = "×".join(map(str, row.shape))
            cells = (f"{row.weights:,}", f"{row.kept:,}", f"{row.sparsity:.2%}", f"{row.share:.2%}")
            lines.append((row.name, shape, *cells))
        return lines

    def _first_lines(self) -> list[str]:
        """Line for every reason to leave leaves out, and one for the zeros of the initial masks."""
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
            line = f"Pruned before and held: {_listed(self.started)}; masks=None frees them"
            lines.append(line)
        if self.remainders:
            lines.append(f"Left dense (not divided by the pattern): {_listed(self.remainders)}")
        return lines

    def _has_stages(self) -> bool:
        """Whether the stages contain more than the rows."""
        return len(self.stages) > 1 or any(set(stage) & set(OPTIONAL) for stage in self.stages)


def _listed(leaves: Sequence[tuple[str, int]]) -> str:
    """Formats numbers of weights in leaves: their sum, and the first leaves."""
    names = ", ".join(f"{name} ({number:,})" for name, number in leaves[:NAMED])
    more = f" and {len(leaves) - NAMED} more" if len(leaves) > NAMED else ""
    return _number(sum(number for _, number in leaves), "weight") + f": {names}{more}"


def brief(report: Report, name: str) -> str:
    """Formats the repr of a report, or of a value with one: a line, and another for a stop."""
    end = "" if report.stopped is None else f"\nStopped: {report.stopped}"
    return f"{name}({report.summary()}){end}"


def stage_table(stages: Sequence[dict[str, Any]]) -> str:
    """Formats a line for every stage of a pruning: predicted and measured numbers.

    Args:
        stages: Dictionaries of the stages, as in `Result`.

    Returns:
        A table of the sparsity after every stage, the predicted and the actual increase of the loss
        in it, in nats per example, and further numbers of its compensation.  Unknown numbers are
        left out.

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
    """Head and cells of the table of stages, without columns that are unknown for all of them."""
    columns = [c for c in COLUMNS if any(stage.get(c) is not None for stage in stages)]

    def cell(stage, column):
        value = stage.get(column)
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        return f"{value:.2%}" if column == "sparsity" else f"{value:.3g}"

    lines = [(str(i), *(cell(s, c) for c in columns)) for i, s in enumerate(stages, 1)]
    return ("stage", *columns), lines


def _number(count: int, noun: str, plural: str | None = None) -> str:
    """Formats a count with its noun."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _plain(value: Any) -> Any:
    """Converts a value to Python types that JSON knows; NaN and infinity become None."""
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
    """Sum of the scores of the weights that masks newly prune, for every leaf."""
    return jax.tree.map(
        lambda s, old, new: jnp.sum(jnp.where(old & ~new, s, 0)), scores, old_masks, masks
    )


def _kept(masks: Any) -> list[jax.Array]:
    return [_tree.count(mask) for mask in jax.tree.leaves(masks)]


def make_report(
    removed: Any,
    masks: Any,
    chosen: list[bool],
    stages: tuple[dict[str, Any], ...] = (),
    stopped: str | None = None,
    left_out: tuple[tuple[str, tuple[int, ...], str], ...] = (),
    started: tuple[tuple[str, int], ...] = (),
    remainders: tuple[tuple[str, int], ...] = (),
) -> Report:
    """Counts the weights that masks keep, beside the scores of the pruned ones.

    Args:
        removed: Number for every leaf: the result of one `removed_scores`, or the sum of several.
        masks: Masks after the pruning.
        chosen: Whether each leaf is prunable.
        stages: Dictionary of numbers for every stage.
        stopped: Reason of a stop that was not requested; None otherwise.
        left_out: Name, shape and reason of every leaf that is not prunable.
        started: Name and number of zeros of every leaf in which the initial masks prune.
        remainders: Name and number of weights of every leaf that a pattern leaves dense.
    """
    kept, lost = jax.device_get((jitted(_kept)(masks), jax.tree.leaves(removed)))
    parts = zip(_tree.named_leaves(masks), kept, lost, chosen, strict=True)
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
    return Report(rows, row("total", (), *sums), stages, stopped, left_out, started, remainders)
