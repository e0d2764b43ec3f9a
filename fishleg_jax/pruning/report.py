"""What pruning did, leaf by leaf: numbers, and a table for people."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree


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
    """A row for every prunable leaf, and their total.  `str` makes a table of it."""

    rows: tuple[Row, ...]
    total: Row

    def __str__(self) -> str:
        """The table, a line a leaf."""
        head = ("leaf", "shape", "weights", "kept", "sparsity", "share of predicted increase")
        lines = [head]
        for row in (*self.rows, self.total):
            shape = "×".join(map(str, row.shape))
            cells = (f"{row.weights:,}", f"{row.kept:,}", f"{row.sparsity:.2%}", f"{row.share:.2%}")
            lines.append((row.name, shape, *cells))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

        def render(line):
            left = f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}"
            return "  ".join(
                [left] + [f"{c:>{w}}" for c, w in zip(line[2:], widths[2:], strict=True)]
            )

        rule = "-" * (sum(widths) + 2 * (len(head) - 1))
        return "\n".join([render(head), rule, *map(render, lines[1:-1]), rule, render(lines[-1])])


def removed_scores(scores: Any, old_masks: Any, masks: Any) -> Any:
    """For every leaf the sum of the scores of the weights that masks newly prune."""
    return jax.tree.map(
        lambda s, old, new: jnp.sum(jnp.where(old & ~new, s, 0)), scores, old_masks, masks
    )


def make_report(removed: Any, masks: Any, chosen: list[bool]) -> Report:
    """Counts what masks keep, beside the scores of what was pruned.

    Args:
        removed: a number for every leaf, of one `removed_scores` or the sum of several.
        masks: masks after the pruning.
        chosen: which leaves are prunable.
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
    return Report(rows, row("total", (), *sums))
