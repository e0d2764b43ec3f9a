"""What pruning did, leaf by leaf: numbers, and a table for people."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree

# of the table of stages; the first ones are there for every stage
COLUMNS = ("sparsity", "predicted", "actual", "held_out", "lost", "cost")
COLUMNS += ("ratio", "step", "damping")
OPTIONAL = COLUMNS[2:]


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
    """A row for every prunable leaf, and their total.  `str` makes tables of it.

    Attributes:
        rows: a row for every prunable leaf.
        total: their total.
        stages: what every stage has to tell, see `Result`.
        stopped: what went wrong, see `Result`.
    """

    rows: tuple[Row, ...]
    total: Row
    stages: tuple[dict, ...] = ()
    stopped: str | None = None

    def __str__(self) -> str:
        """A line for every leaf, one for every stage that has something to tell, and the stop."""
        lines = []
        for row in (*self.rows, self.total):
            shape = "×".join(map(str, row.shape))
            cells = (f"{row.weights:,}", f"{row.kept:,}", f"{row.sparsity:.2%}", f"{row.share:.2%}")
            lines.append((row.name, shape, *cells))
        head = ("leaf", "shape", "weights", "kept", "sparsity", "share of predicted increase")
        table = _table(head, lines, texts=2)
        parts = ["\n".join([*table[:-1], table[1], table[-1]])]
        if len(self.stages) > 1 or any(set(stage) & set(OPTIONAL) for stage in self.stages):
            parts.append(stage_table(self.stages))
        if self.stopped is not None:
            parts.append(f"Stopped: {self.stopped}")
        return "\n\n".join(parts)


def stage_table(stages: Sequence[dict]) -> str:
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
    columns = [c for c in COLUMNS if any(stage.get(c) is not None for stage in stages)]

    def cell(stage, column):
        value = stage.get(column)
        if value is None:
            return ""
        return f"{value:.2%}" if column == "sparsity" else f"{value:.3g}"

    lines = [(str(i), *(cell(s, c) for c in columns)) for i, s in enumerate(stages, 1)]
    return "\n".join(_table(("stage", *columns), lines, texts=1))


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]], texts: int) -> list[str]:
    """The lines of a table; the first columns are texts, the others numbers."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def render(line):
        cells = [
            f"{c:<{w}}" if i < texts else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells)

    rule = "-" * (sum(widths) + 2 * (len(head) - 1))
    return [render(head), rule, *map(render, lines)]


def removed_scores(scores: Any, old_masks: Any, masks: Any) -> Any:
    """For every leaf the sum of the scores of the weights that masks newly prune."""
    return jax.tree.map(
        lambda s, old, new: jnp.sum(jnp.where(old & ~new, s, 0)), scores, old_masks, masks
    )


def make_report(
    removed: Any,
    masks: Any,
    chosen: list[bool],
    stages: tuple[dict, ...] = (),
    stopped: str | None = None,
) -> Report:
    """Counts what masks keep, beside the scores of what was pruned.

    Args:
        removed: a number for every leaf, of one `removed_scores` or the sum of several.
        masks: masks after the pruning.
        chosen: which leaves are prunable.
        stages: what every stage has to tell.
        stopped: what went wrong.
    """
    kept = jax.tree.map(jnp.sum, masks)
    parts = zip(
        _tree.named_leaves(masks), jax.tree.leaves(kept), jax.tree.leaves(removed), chosen,
        strict=True,
    )  # fmt: skip
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
    return Report(rows, row("total", (), *sums), stages, stopped)
