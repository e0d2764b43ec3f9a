"""One-shot pruning: fit an inverse Fisher to batches, score, mask, compensate, stage by stage."""

from collections.abc import Sequence
from typing import Any

import jax

from fishleg_jax import _prunable
from fishleg_jax._devices import mesh
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import BatchLike, Model
from fishleg_jax.pruning.compensation._independent import Compensation
from fishleg_jax.pruning.leaves import Leaves
from fishleg_jax.pruning.masks.densities import Scope
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.one_shot.result import Result
from fishleg_jax.pruning.one_shot.run import checked
from fishleg_jax.pruning.one_shot.stage import score
from fishleg_jax.pruning.one_shot.stages import Stages
from fishleg_jax.pruning.scores import Saliency
from fishleg_jax.pruning.selection._border import Selection
from fishleg_jax.pruning.target_types import Target


@mesh.in_mesh_of_params
def prune_one_shot(
    model: Model,
    params: Any,
    estimator: InverseFisher,
    batches: Sequence[BatchLike],
    *,
    sparsity: float | Target | None = None,
    stages: int | Stages | None = None,
    held_out: Sequence[BatchLike] | float | None = 0.2,
    scope: Scope = "global",
    saliency: Saliency = "auto",
    compensation: Compensation | None = None,
    selection: Selection | None = None,
    prunable: _prunable.LeafSelection | Leaves = None,
    masks: Any | None = "zeros",
    key: jax.Array | None = None,
    pattern: Pattern | None = None,
) -> Result:
    """Prunes a trained model once, by Optimal Brain Surgeon with an estimate of the inverse Fisher.

    Runs on the host and compiles its parts itself, so it can't be called under `jit`.  Weights and
    batches may be sharded over devices; results are placed like the weights.  Under Explicit axes
    this model may have to name axes, while those of K-FAC, diagonal, WoodFisher and M-FAC must not.

    Args:
        model: Model; the compensation receives the curvature of its loss.
        params: Trained weights, any pytree of floating-point arrays.
        estimator: Estimate of the inverse Fisher; `inverse.identity()` makes this magnitude
            pruning.
        batches: Batches of training data for the curvature, never of the data reported on.
        sparsity: Fraction of the n prunable weights to prune, in [0, 1): `floor(sparsity · n)`; or
            one of `targets`: a number of weights, bytes or operations to keep, the most that a
            limit on a loss or a metric allows, or masks chosen elsewhere.  None for the sparsity
            that a pattern of n:m, or densities by name, give.
        stages: Number of stages, each of which refits the inverse at the weights and masks of the
            stage before; None, the default, for as many as it takes, up to 16; or
            `flj.Stages(number, schedule=, batches_per_stage=, ...)`.
        held_out: Labelled batches of training data that the curvature does not see: their loss
            chooses between scores and dampings, and ends the solves of a compensation.  Or the
            share of `batches` to set aside for that, 0.2 by default: whole batches where there are
            enough, else examples of each, so shuffle them; none if `Stages` has a state, or if the
            default share has fewer than 16 examples or leaves too few for the fit.  0 or None for
            none; a compensation then checks on `batches`.
        scope: `global`, the default, for one threshold over all prunable leaves, `layer` for one in
            each; `erk` for densities of the leaves by their dimensions, or a mapping from regular
            expressions over key paths to densities, as in `make_masks`.
        saliency: Scores, of which the lowest are pruned: `obs`, `½ w² / [F⁻¹]_ii`; `obd`,
            `½ w² F_ii`; `mixture`, their geometric mean; `magnitude`, `½ w²`; or a function
            `(params, masks, estimator, state, gradient) -> scores`.  `auto`, the default, tries all
            of these and OBS scores at a tenth and ten times the damping, each with a cheap
            compensation, and takes the lowest held-out loss, stage by stage: `obs`, unless another
            is better by a standard error of the paired difference.  Where a winner repeats, its
            nearest rivals alone are tried in most stages.  Without held-out data `obs`.
        compensation: Change of the kept weights that makes up for the pruned ones, one of
            `flj.compensation`; by default `group()`, or where that can't be (no Fisher products, no
            labels to check on, `inverse.identity`) `independent()`.  With `first_order=True` in it,
            OBS scores and selection take the gradient into account, too:
            `(w − F⁻¹g)² / (2 [F⁻¹]_ii)`.
        selection: Optional refinement of the score-based masks by swapping weights,
            `selection.swaps()` or `selection.qubo()`; None for the score-based masks.
        prunable: Leaves that may be pruned: regular expressions over key paths; a mapping of these
            to True or False, where the first match decides; a pytree of booleans like the weights,
            or a prefix of it; or a predicate `(name, leaf) -> bool`, called once, on the weights.
            By default all but vectors (at most one dimension larger than 1) and leaves with the
            name of a bias, a normalisation's parameter, an embedding or a position; the report
            lists the leaves left out and why.  `flj.Leaves` adds leaves that a compensation may
            move, stacked layers, and costs of weights.
        masks: Weights that are already pruned and stay pruned; they count towards the sparsity.
            `"zeros"`, the default, takes the zeros of every leaf that is prunable, now or by
            default (an all-zero leaf or layer counts as untrained, not as pruned); None starts
            without masks; or a pytree of booleans like the weights, False for pruned.
        key: Random key; `jax.random.key(0)` by default.
        pattern: Weights that are pruned together, one of `flj.patterns`: n of every m, blocks, or
            whole units; None, the default, for single weights.  Groups are scored with their own
            blocks of the inverse Fisher, `½ w_Bᵀ [(F⁻¹)_BB]⁻¹ w_B`, or of the Fisher, and pruned
            whole, those with the lowest scores per weight first.

    Returns:
        A `Result`: weights, masks, a report, the estimator's state, and the numbers of each stage.

    Raises:
        ValueError: A sparsity outside [0, 1) or below that of the initial masks, NaN or infinity in
            weights or batches, an empty or mismatched batch, an integer leaf, nothing prunable, an
            expression that matches nothing, costs that are not positive, an unreachable target,
            constants from `recalibrate` that do not match the batches', a selection that prunes
            another number of weights than the scores do; batches without labels where the gradient
            or a check needs them; an estimator of another model, one that waits for more gradients
            than there are, one that needs single examples where `predict` depends on their
            neighbours, or one whose Fisher is zero for every prunable weight; an argument of
            another type; a call under `jit`.
        FloatingPointError: Predictions, measured losses, the fitted inverse or the pruned weights
            are not finite in the first stage, when nothing is pruned yet.  Later, this ends the
            pruning instead, as do constants from `recalibrate` that are not finite; the reason is
            in `Result.stopped`.

    References:
        McGowan et al., Efficient model compression techniques with FishLeg, 2024.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> weights = jnp.array([[3.0, 0.1], [2.0, 0.2]])
        >>> batch = (jax.random.normal(jax.random.key(0), (100, 2)), None)
        >>> result = flj.prune_one_shot(model, weights, flj.inverse.fishleg(model), [batch],
        ...                             sparsity=0.5)
        >>> result.masks.tolist()
        [[True, False], [True, False]]
    """
    # Reject invalid arguments before anything is compiled.
    run = checked(
        *(model, params, estimator, batches),
        sparsity=sparsity,
        stages=stages,
        held_out=held_out,
        scope=scope,
        saliency=saliency,
        compensation=compensation,
        selection=selection,
        prunable=prunable,
        masks=masks,
        key=key,
        pattern=pattern,
    )
    point, state, reports, stopped = run.start, None, (), None
    for stage in range(run.stages.number):
        try:
            # Fit the inverse Fisher at the weights that earlier stages left.
            own, curvature = run.data.of_stage(stage, point.params)
            fitted = run.fit(stage, point, own, state)
            # Score, then mask and compensate as far as the goal goes.
            step = run.goal(score(run.plan, point, fitted, curvature), reports)
        except FloatingPointError as error:
            if stage == 0:
                raise
            stopped = (
                f"stage {stage + 1} of {run.stages.number} failed: {error}; the weights are those "
                f"of the stage before, at a sparsity of {reports[-1]['sparsity']:.6g}"
            )
            break
        # Report.
        point, stopped = step.point, step.stopped
        if state is None or step.report is not None:
            state = fitted
        if step.report is not None:
            reports += (step.report,)
            if run.stages.on_stage is not None:
                run.stages.on_stage(run.result(point, state, reports, stopped))
        if step.last:
            break
    return run.result(point, state, reports, stopped)
