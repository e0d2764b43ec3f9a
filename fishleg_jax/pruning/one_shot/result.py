"""The value that `prune_one_shot` returns."""

from typing import Any, NamedTuple

from fishleg_jax.pruning.report import Report, brief


class Result(NamedTuple):
    """What `prune_one_shot` returns.

    Attributes:
        params: the pruned and compensated weights, of the dtypes that came in; pruned ones are 0.0.
        masks: a pytree of booleans, False for pruned weights.
        report: a row for every prunable leaf and a total; print it.
        state: the state of the inverse Fisher (of the last stage), to use again at another
            sparsity.
        stages: for every stage a dictionary of its `sparsity`, the increase of the loss that was
            `predicted` for it, the `actual` one where it is known, what is `lost` of a limit so far
            or the `cost` that is kept of a budget, and what the compensation tells.
        stopped: None where all went as asked for; else a sentence: at which stage what was not
            finite, weights, masks and state being those of the stage before; or how a target was
            not reached.
        constants: what `recalibrate` made for these weights, None without it or where that was not
            finite.
    """

    params: Any
    masks: Any
    report: Report
    state: Any
    stages: tuple[dict[str, Any], ...]
    stopped: str | None = None
    constants: Any | None = None

    def __repr__(self) -> str:
        """Sparsity, kept weights, stages and the stop; none of the arrays."""
        return brief(self.report, "Result")

    def _repr_html_(self) -> str:
        """The tables of the report, for a notebook."""
        return self.report._repr_html_()
