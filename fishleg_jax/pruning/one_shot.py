"""One-shot pruning: fit an inverse Fisher to batches, score, mask, compensate, stage by stage."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree, _validate, fisher
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Batch, Model, predict
from fishleg_jax.pruning import _stage
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning import masks as _masks
from fishleg_jax.pruning import selection as _selection
from fishleg_jax.pruning.report import Report, make_report
from fishleg_jax.pruning.schedules import stage_sparsities

GOOD, POOR = 0.25, 1.0  # ratios of a prediction's error, see `_adapted`


class Result(NamedTuple):
    """What `prune_one_shot` returns.

    Attributes:
        params: the pruned and compensated weights, of the dtypes that came in; pruned ones are 0.0.
        masks: a pytree of booleans, False for pruned weights.
        report: a row for every prunable leaf and a total; print it.
        state: the state of the inverse Fisher (of the last stage), to use again at another
            sparsity.
        stages: for every stage a dictionary of its `sparsity` and what the compensation tells.
    """

    params: Any
    masks: Any
    report: Report
    state: Any
    stages: tuple[dict, ...]


def fit(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[Batch],
    *,
    key: jax.Array,
    masks: Any | None = None,
    on_update: Callable[[int, int, Any], None] | None = None,
) -> Any:
    """Fits an inverse Fisher to batches: `estimator.updates` updates, or one pass over them.

    Args:
        estimator: the estimate.
        params: weights, any pytree of floating-point arrays.
        batches: batches of training data; equal shapes save compilations.
        key: a random key.
        masks: which weights survive; None for all.
        on_update: called as `on_update(updates done, updates in all, state)` after every update;
            the next update takes the state's memory, so what is to be kept has to be copied.

    Returns:
        The estimator's state.

    Raises:
        ValueError: unsound weights or batches, see `prune_one_shot`.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> flj.fit(flj.inverse.identity(), jnp.ones(2), [(jnp.ones((1, 2)), None)],
        ...         key=jax.random.key(0))
        ()
    """
    _validate.check_params(params)
    _validate.check_batches(batches)
    if masks is not None:
        _tree.check_same(params, masks, "masks")
    total = len(batches) if estimator.updates is None else estimator.updates
    # a state may be as large as memory allows, so each makes room for the next; compiled, `init`
    # gives every leaf memory of its own
    update = jitted(estimator.update, donate=0)
    state = jitted(estimator.init)(params)
    for i in range(total):
        state = update(state, params, batches[i % len(batches)], jax.random.fold_in(key, i), masks)
        if on_update is not None:
            on_update(i + 1, total, state)
    return state


def prune_one_shot(
    model: Model,
    params: Any,
    estimator: InverseFisher,
    batches: Sequence[Batch],
    *,
    sparsity: float,
    stages: int = 1,
    schedule: str = "geometric",
    batches_per_stage: int | None = None,
    held_out: Sequence[Batch] | None = None,
    adapt_damping: bool = False,
    scope: str = "global",
    compensation: _compensation.Compensation | None = None,
    first_order: bool = False,
    costs: Any | None = None,
    selection: _selection.Selection | None = None,
    prunable: _tree.Selection = None,
    key: jax.Array | None = None,
    state: Any | None = None,
    on_update: Callable[[int, int, Any], None] | None = None,
) -> Result:
    """Prunes a trained model once, by Optimal Brain Surgeon with an estimate of the inverse Fisher.

    Args:
        model: the model; the curvature of the loss that it makes is handed to the compensation.
        params: its trained weights, any pytree of floating-point arrays.
        estimator: the inverse Fisher; `inverse.identity()` makes this magnitude pruning.
        batches: batches of training data for the curvature, never of the data reported on.
        sparsity: the fraction of the n prunable weights to prune, in [0, 1): `floor(sparsity · n)`.
        stages: in how many stages; each fits the inverse anew, from nothing, at the weights and
            masks of the one before.
        schedule: how sparsity grows from stage to stage: `geometric` in density, `linear` or
            `polynomial`; see `stage_sparsities`.
        batches_per_stage: each stage takes the next so many batches, around and around, for its
            curvature; None for all of them in every stage.
        held_out: labelled batches of training data that the curvature does not see, by whose loss
            steps are checked; the default compensation then has a check, too.
        adapt_damping: whether a stage takes over a damping that the compensation of the one before
            had to raise, doubles one that predicted badly and halves one that predicted well; it
            needs `group` without a damping of its own, and an estimator whose state has one that
            may be changed after the fit (not `woodfisher` in blocks of a given size).
        scope: `global` for one threshold over all prunable leaves, `layer` for one in each.
        compensation: what kept weights do about it; `compensation.independent()` by default, with
            the gradient where the scores have it.
        first_order: whether scores take the gradient into account, `(w − F⁻¹g)² / (2 [F⁻¹]_ii)`.
        costs: what a weight costs, a pytree of positive numbers or arrays such as `weight_costs`
            makes: scores are divided by it, so that of equal scores the dearer weight goes first.
        selection: what betters the masks of the scores, weight for weight, `selection.swaps()` or
            `selection.qubo()`; None for those masks.
        prunable: regular expressions over key paths, or a predicate `(name, leaf) -> bool`; by
            default every leaf of two or more dimensions.
        key: a random key; `jax.random.key(0)` by default.
        state: a fitted state of the estimator at these weights, to skip the fit of a single stage.
        on_update: see `fit`.

    Returns:
        Weights, masks, a report, the estimator's state, and what each stage has to tell.

    Raises:
        ValueError: a sparsity outside [0, 1), NaN or infinity in weights or batches, an empty or
            mismatched batch, an integer leaf, nothing prunable, an expression that matches nothing,
            costs that are not positive, a selection of another number of weights than the scores'.
        FloatingPointError: predictions, the fitted inverse or the pruned weights are not finite.

    References:
        McGowan et al., Efficient model compression techniques with FishLeg, 2024.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> weights = jnp.array([[3.0], [0.1], [2.0], [0.2]])
        >>> batch = (jax.random.normal(jax.random.key(0), (100, 4)), None)
        >>> result = flj.prune_one_shot(model, weights, flj.inverse.fishleg(model), [batch],
        ...                             sparsity=0.5)
        >>> result.masks[:, 0].tolist()
        [True, False, True, False]
    """
    _validate.check_params(params)
    _validate.check_batches(batches)
    _masks.number_to_prune(sparsity, 1)
    chosen = _tree.select(params, prunable, "prunable")
    if scope not in _masks.SCOPES:
        raise ValueError(f"scope must be one of {', '.join(_masks.SCOPES)}, got {scope!r}")
    targets = stage_sparsities(sparsity, stages, schedule=schedule)
    if compensation is None:
        checked = first_order or held_out is not None
        compensation = _compensation.independent(first_order=first_order, check_step=checked)
    if costs is not None:
        _validate.check_costs(params, costs, chosen)
    key = jax.random.key(0) if key is None else key
    if estimator.updates != 0:
        _check_model(model, params, batches[0])
    if state is not None and stages > 1:
        raise ValueError(f"state is for a single stage, which needs no other fit; stages={stages}")
    if state is not None and not _alike(state, jax.eval_shape(estimator.init, params)):
        raise ValueError(
            "state must be one of this estimator for these params; it has other shapes"
        )

    if held_out is not None:
        _validate.check_batches(held_out)
    if adapt_damping and not hasattr(jax.eval_shape(estimator.init, params), "damping"):
        raise ValueError("adapt_damping needs an estimator whose state has a damping")
    if batches_per_stage is not None and batches_per_stage not in range(1, len(batches) + 1):
        raise ValueError(
            f"batches_per_stage must be from 1 to {len(batches)}, the number of batches, "
            f"got {batches_per_stage}"
        )
    per_stage = len(batches) if batches_per_stage is None else batches_per_stage
    check = None if held_out is None else fisher.curvature(model, held_out)
    plan = _stage.Plan(estimator, compensation, scope, first_order, costs, prunable, selection)
    point, factor, told = _stage.dense(params), 1.0, []  # a factor of the damping
    for stage, target in enumerate(targets):
        stage_key = key if stages == 1 else jax.random.fold_in(key, stage)
        seen_batches = [batches[(stage * per_stage + i) % len(batches)] for i in range(per_stage)]
        curvature = fisher.curvature(model, seen_batches)
        if check is not None:
            curvature = curvature._replace(loss=check.loss)
        if state is None or stage > 0:
            seen = point.masks if stage > 0 else None
            state = fit(
                estimator, point.params, seen_batches,
                key=stage_key, masks=seen, on_update=on_update,
            )  # fmt: skip
        if adapt_damping:
            state = state._replace(damping=state.damping * factor)
        point, info = _stage.advance(plan, point, state, target, curvature)
        told.append({"sparsity": target} | info)
        if adapt_damping:
            factor *= _adapted(info)
    report = make_report(point.removed, point.masks, chosen)
    return Result(point.params, point.masks, report, state, tuple(told))


def _adapted(info: dict) -> float:
    """What the damping is to be multiplied with after a stage: Levenberg and Marquardt's rule.

    The loss rises when weights are pruned, so that the textbook's ratio of actual to predicted
    decrease says nothing; how far the prediction is off, in units of the damped quadratic, does.
    """
    raised = info.get("raised")
    if raised is None:
        raise ValueError("adapt_damping needs compensation.group() without a damping of its own")
    if not math.isfinite(info["ratio"]) or info["ratio"] > POOR:
        return 2 * raised
    return raised if raised > 1.5 or info["ratio"] > GOOD else 0.5


def _alike(state: Any, expected: Any) -> bool:
    """Whether two states have one structure and the same shapes."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return all(jnp.shape(a) == b.shape for a, b in pairs)


def _check_model(model: Model, params: Any, batch: Batch) -> None:
    """Raises where a model can't predict a batch, or predicts NaN or infinity."""
    try:
        outputs = jitted(predict, model)(params, batch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"batches[0] does not fit the model: {error}") from error
    if not bool(_tree.all_finite(outputs)):
        raise FloatingPointError("the model predicts NaN or infinity on batches[0]")
