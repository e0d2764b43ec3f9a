"""Value that `prune_one_shot` returns."""

from typing import Any, NamedTuple

from fishleg_jax.pruning.report import Report, brief


class Result(NamedTuple):
    """Pruned weights, masks and numbers that `prune_one_shot` returns.

    Attributes:
        params: Pruned and compensated weights, in the dtypes of the input; pruned ones are 0.0.
        masks: Pytree of booleans like the weights, False for pruned.
        report: Row for every prunable leaf and a total; print it.
        state: State of the inverse Fisher (of the last stage), for reuse at another sparsity.
        stages: Dictionary for every stage: its `sparsity` (with a pattern the one that whole groups
            reach, at most the one asked for), the `predicted` increase of the loss in
            it, the `actual` one if known, the amount of a limit `lost` so far or the `cost` kept of
            a budget, and the numbers that the compensation reports.
        stopped: None if all went as requested; else a sentence that says at which stage a number
            was not finite (weights, masks and state are then those of the stage before), or how a
            target was missed.
        constants: Constants that `recalibrate` returned for these weights; None without it, or if
            they were not finite.
    """

    params: Any
    masks: Any
    report: Report
    state: Any
    stages: tuple[dict[str, Any], ...]
    stopped: str | None = None
    constants: Any | None = None

    def __repr__(self) -> str:
        """Sparsity, kept weights, stages and the reason of a stop, without the arrays."""
        return brief(self.report, "Result")

    def _repr_html_(self) -> str:
        """Tables of the report, for a notebook."""
        return self.report._repr_html_()
