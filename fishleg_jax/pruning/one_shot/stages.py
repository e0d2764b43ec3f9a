"""Number of stages of a one-shot pruning, and how they run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Stages(NamedTuple):
    """Number of stages of `prune_one_shot`, and how they run.

    Each stage refits the inverse Fisher, at the weights and masks of the stage before; FishLeg
    carries its state on, in a quarter of a fit.

    Attributes:
        number: Number of stages, at least 1.  None, the default, for as many as it takes, up to
            `most`: each goes as far in density as the quadratic model predicts the loss.  That
            needs a sparsity to go to, labels, and a compensation that predicts the loss, as `group`
            does; a single stage otherwise.
        schedule: Growth of the sparsity from stage to stage: `geometric` in density, `linear` or
            `polynomial` (see `stage_sparsities`), or the sparsities after all stages.
        batches_per_stage: Number of batches whose curvature a stage sees: each takes the next ones,
            in turn; None for all batches in every stage.
        recalibrate: Function `(params, batches) -> constants`, called with the weights after every
            stage and its batches.  The constants, such as batch-norm statistics of the pruned
            network, replace those in all batches from then on.  A target's loss is measured with
            constants for the weights at hand, from all batches.
        state: Fitted state of the estimator at these weights, which saves the fit of a single
            stage, as `Result.state`; None to fit one.  Used as it is: if leaves are adjustable
            or weights pruned already, fit it with the masks of what may move, `fit(masks=)`.
        examples_per_chunk: Number of examples at a time in losses, gradients and Fisher products of
            the compensation, which bounds their memory; None for a whole batch.  The estimator has
            an argument of the same name for its own.
        on_update: Function `(updates done, updates in all, state)`, called after every update of a
            fit, so None if `state` is given.  The state is donated to the next update; copy
            anything you want to keep.
        on_stage: Function `(result)`, called after every stage with the `Result` so far.
        most: Largest number of stages if they choose themselves, 16 by default.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.Stages(8, schedule="linear").number
        8
    """

    number: int | None = None
    schedule: str | Sequence[float] = "geometric"
    batches_per_stage: int | None = None
    recalibrate: Callable[[Any, Sequence[Any]], Any] | None = None
    state: Any | None = None
    examples_per_chunk: int | None = None
    on_update: Callable[[int, int, Any], None] | None = None
    on_stage: Callable[[Any], None] | None = None
    most: int = 16
