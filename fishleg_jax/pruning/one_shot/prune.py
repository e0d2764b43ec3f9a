"""One-shot pruning: fit an inverse Fisher to batches, score, mask, compensate, stage by stage."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from fishleg_jax import _chunks, _prunable, _tree, fisher
from fishleg_jax._checks import arrays, models, numbers
from fishleg_jax._devices import mesh
from fishleg_jax.inverse.base import InverseFisher, check_on_host, compiled
from fishleg_jax.model import Batch, Model, check_all_targets, check_model
from fishleg_jax.pruning import _soundness
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning import selection as _selection
from fishleg_jax.pruning.compensation import _adjustable
from fishleg_jax.pruning.masks import build as _masks
from fishleg_jax.pruning.masks import groups as _groups
from fishleg_jax.pruning.one_shot import (
    budget,
    walk,
)
from fishleg_jax.pruning.one_shot import (
    checks as _arguments,
)
from fishleg_jax.pruning.one_shot import (
    goal as _goal,
)
from fishleg_jax.pruning.one_shot import (
    stage as _stage,
)
from fishleg_jax.pruning.report import Report, brief, make_report
from fishleg_jax.pruning.targets import Budget, Target


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


@mesh.in_mesh_of_params
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
        ValueError: unsound weights or batches, see `prune_one_shot`; no estimator, no random key;
            a `predict` that depends on an example's neighbours, where the estimate needs gradients
            of single examples.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> flj.fit(flj.inverse.identity(), jnp.ones(2), [(jnp.ones((1, 2)), None)],
        ...         key=jax.random.key(0))
        ()
    """
    check_on_host(estimator)
    arrays.check_params(params)
    arrays.check_batches(batches)
    _arguments.check_key(key)
    _arguments.check_functions(None, on_update, None)
    if masks is not None:
        _tree.check_same(params, masks, "masks")
    check_all_targets(estimator.model, params, batches, "batches")
    if estimator.model is not None:
        _soundness.check_single_examples(estimator, estimator.model, params, batches)
    return _fitted(estimator, params, batches, key, masks, on_update)


def _fitted(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[Batch],
    key: jax.Array,
    masks: Any | None,
    on_update: Callable[[int, int, Any], None] | None,
) -> Any:
    """What `fit` returns, of arguments that are checked."""
    total = len(batches) if estimator.updates is None else estimator.updates
    # a state may be as large as memory allows, so each makes room for the next; compiled, `init`
    # gives every leaf memory of its own
    init, update = compiled(estimator, params)
    state = init(params)
    for i in range(total):
        state = update(state, params, batches[i % len(batches)], jax.random.fold_in(key, i), masks)
        if on_update is not None:
            on_update(i + 1, total, state)
    return state


@mesh.in_mesh_of_params
def prune_one_shot(
    model: Model,
    params: Any,
    estimator: InverseFisher,
    batches: Sequence[Batch],
    *,
    sparsity: float | Target,
    stages: int = 1,
    schedule: str | Sequence[float] = "geometric",
    batches_per_stage: int | None = None,
    held_out: Sequence[Batch] | None = None,
    adapt_damping: bool = True,
    recalibrate: Callable[[Any, Sequence[Batch]], Any] | None = None,
    scope: str = "global",
    compensation: _compensation.Compensation | None = None,
    first_order: bool = False,
    costs: Any | None = None,
    selection: _selection.Selection | None = None,
    prunable: _prunable.Selection = None,
    adjustable: _prunable.Selection = None,
    stacked: _tree.Stacked = None,
    masks: Any | None = "zeros",
    key: jax.Array | None = None,
    state: Any | None = None,
    examples_per_chunk: int | None = None,
    on_update: Callable[[int, int, Any], None] | None = None,
    on_stage: Callable[[Result], None] | None = None,
) -> Result:
    """Prunes a trained model once, by Optimal Brain Surgeon with an estimate of the inverse Fisher.

    It runs on the host, and compiles its parts itself: it can't be called under `jit`.  Weights and
    batches may be spread over devices; what comes back lies where the weights do.  Under Explicit
    axes this model may have to name axes, while those of K-FAC, diagonal, WoodFisher and M-FAC may
    not.

    Args:
        model: the model; the curvature of the loss that it makes is handed to the compensation.
        params: its trained weights, any pytree of floating-point arrays.
        estimator: the inverse Fisher; `inverse.identity()` makes this magnitude pruning.
        batches: batches of training data for the curvature, never of the data reported on.
        sparsity: the fraction of the n prunable weights to prune, in [0, 1): `floor(sparsity · n)`;
            or one of `targets`: so many weights, bytes or operations, or as many as a loss or a
            metric allows.
        stages: in how many stages; each fits the inverse anew, from nothing, at the weights and
            masks of the one before.
        schedule: how sparsity grows from stage to stage: `geometric` in density, `linear` or
            `polynomial`, see `stage_sparsities`; or the sparsities after all stages themselves.
        batches_per_stage: each stage takes the next so many batches, around and around, for its
            curvature; None for all of them in every stage.
        held_out: labelled batches of training data that the curvature does not see, by whose loss
            steps are checked; the default compensation then has a check, too.
        adapt_damping: whether a stage begins with the damping that `group` found in the stage
            before, rather than with the estimate's own.
        recalibrate: called as `recalibrate(params, batches)` with the weights after every stage and
            its batches; the constants that it returns, such as batch-norm statistics that fit the
            pruned weights, take the place of those in all batches from then on.  A target's loss
            is measured with those of the weights at hand, made from all batches.
        scope: `global` for one threshold over all prunable leaves, `layer` for one in each.
        compensation: what kept weights do about it; `compensation.independent()` by default, with
            the gradient where the scores have it.
        first_order: whether scores take the gradient into account, `(w − F⁻¹g)² / (2 [F⁻¹]_ii)`.
        costs: what a weight costs, a pytree of positive numbers or arrays such as `weight_costs`
            makes: scores are divided by it, so that of equal scores the dearer weight goes first.
        selection: what betters the masks of the scores, weight for weight, `selection.swaps()` or
            `selection.qubo()`; None for those masks.
        prunable: Leaves that may be pruned: regular expressions over key paths; a mapping of these
            to True or False, where the first match decides; a pytree of booleans like the weights,
            or a prefix of it; or a predicate `(name, leaf) -> bool`, asked once, of the weights.
            By default all but vectors (at most one dimension larger than 1) and leaves with the
            name of a bias, a normalisation's parameter, an embedding or a position; the report
            lists what was left out and why.
        adjustable: Leaves that a compensation may move, given like `prunable`; None for all.  The
            estimate is then fitted to these and the prunable leaves; weights elsewhere stay as they
            are, bit for bit.
        stacked: Leaves with a leading axis of layers, as `lax.scan` over layers needs, by regular
            expressions or a predicate: with `scope="layer"` each layer has its own threshold.  The
            estimators `kfac` and `fishleg` take the same argument for their factors.
        masks: Weights that are pruned already and stay so; they count towards the sparsity.
            `"zeros"`, the default, takes the zeros of every leaf that is prunable, now or by
            default (a leaf or layer of zeros only counts as untrained, not as pruned); None starts
            from no mask; or a pytree of booleans like the weights, False for pruned.
        key: a random key; `jax.random.key(0)` by default.
        state: a fitted state of the estimator at these weights, to skip the fit of a single stage.
        examples_per_chunk: bounds the memory of losses, gradients and Fisher products of the
            compensation; the estimator has an argument of the same name for its own.
        on_update: see `fit`.
        on_stage: called after every stage with what would be returned if it were the last one.

    Returns:
        Weights, masks, a report, the estimator's state, and what each stage has to tell.

    Raises:
        ValueError: a sparsity outside [0, 1) or below that of the masks of before, NaN or infinity
            in weights or batches, an empty or mismatched batch, an integer leaf, nothing prunable,
            an expression that matches nothing, costs that are not positive, a target that no
            pruning can reach, constants from `recalibrate` that are unlike the batches', a
            selection of another number of weights than the scores'; batches without labels where
            the gradient or a check needs them; an estimator of another model, one that waits for
            more gradients than there are, one that needs single examples where `predict` depends
            on their neighbours, or one whose Fisher is zero for every prunable weight; an argument
            of another type; a call under `jit`.
        FloatingPointError: predictions, losses that are measured, the fitted inverse or the pruned
            weights are not finite in the first stage, when nothing is pruned yet; a later one ends
            the pruning instead, as do constants from `recalibrate` that are not finite, see
            `Result.stopped`.

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
    _arguments.check_host(params, batches, held_out, costs, state, key)
    check_on_host(estimator)
    check_model(model)
    models.check_same_model(estimator.model, model, (params, batches))
    arrays.check_params(params)
    arrays.check_batches(batches)
    groups = _groups.make_groups(params, prunable, scope, stacked)
    start = _stage.begin(params, _groups.first_masks(params, groups, masks))
    before = sum(map(int, _groups.zeros_in(groups, start.masks)))
    goal = _goal.sparsity_or_target(sparsity, groups)
    sparsities = _goal.planned(goal, stages, schedule, budget.sparsity_of(before, groups.weights))
    if sparsities and not isinstance(goal, Budget):
        _masks.check_room(groups, sparsities[-1], before)
    if selection is not None and isinstance(goal, Budget):
        raise ValueError(
            f"selection keeps a number of weights, not a budget of {goal.unit}: leave it out, or "
            "use targets.weights"
        )
    for name, flag in (("first_order", first_order), ("adapt_damping", adapt_damping)):
        numbers.check_flag(flag, name)
    _arguments.check_functions(recalibrate, on_update, on_stage)
    _chunks.check_chunk(examples_per_chunk)
    if selection is not None:
        _arguments.check_selection(selection)
        if scope == "layer" and any(groups.stacked):
            raise ValueError(
                "selection swaps weights within a leaf and does not know its layers: use "
                'scope="global" or leave out stacked'
            )
    if compensation is None:
        checked = first_order or held_out is not None
        compensation = _compensation.independent(first_order=first_order, check_step=checked)
    _arguments.check_compensation(compensation)
    moves = _adjustable.decide(params, adjustable)
    _adjustable.check_compensation(compensation, moves)
    if costs is not None:
        arrays.check_costs(params, costs, groups.chosen)
    key = jax.random.key(0) if key is None else key
    _arguments.check_key(key)
    per_stage = _arguments.check_per_stage(batches_per_stage, len(batches))
    if state is None:
        _soundness.check_enough(estimator, batches, stages, per_stage)
    if estimator.updates != 0:
        _arguments.check_model(model, params, batches[0])
        _soundness.check_single_examples(estimator, model, params, batches)
    _arguments.check_state(state, estimator, params, stages)
    if held_out is not None:
        arrays.check_batches(held_out, "held_out", like=batches[0])
    check_all_targets(model, params, batches, "batches")
    check_all_targets(model, params, held_out or (), "held_out")
    _arguments.check_needs(
        compensation, estimator, model, params, batches, held_out, first_order
    )  # fmt: skip
    if recalibrate is not None and len(batches[0]) < 3:
        raise ValueError(
            "recalibrate makes constants: batches must be (inputs, targets, constants), got "
            "(inputs, targets)"
        )
    labelled = _arguments.have_labels(batches if held_out is None else held_out)
    measure = stages > 1 and estimator.updates != 0 and labelled
    plan = _stage.Plan(
        estimator, compensation, groups, first_order, costs, measure, selection, moves
    )
    # an estimate is of the weights that are free; without a mask where that is all of them
    started = _groups.already_pruned(groups, start.masks)
    all_free = not started and moves is None

    curvature_on = partial(fisher.curvature, model, examples_per_chunk=examples_per_chunk)
    if measure or first_order or getattr(compensation, "measures_loss", False):
        _soundness.check_losses(curvature_on, params, batches, "batches")
        _soundness.check_losses(curvature_on, params, held_out or [], "held_out")

    def seen_in(stage: int) -> list[Batch]:
        return [batches[(stage * per_stage + i) % len(batches)] for i in range(per_stage)]

    def constants_for(weights: Any, own: Sequence[Batch]) -> Any | None:
        if recalibrate is None:
            return None
        constants = recalibrate(weights, own)
        arrays.check_constants(constants, own[0])
        return constants

    latest = {}  # what was made of the weights after so many stages, for all who ask

    def constants_after(stages_done: int, weights: Any) -> Any | None:
        if stages_done not in latest:
            latest.clear()
            latest[stages_done] = constants_for(weights, seen_in(max(stages_done - 1, 0)))
        return latest[stages_done]

    def fit_at(stage: int, point: _stage.Point) -> tuple[Any, fisher.Curvature]:
        constants = constants_after(stage, point.params) if stage > 0 else None
        own = _with(seen_in(stage), constants)
        curvature = curvature_on(own)
        if held_out is not None:
            check = curvature_on(_with(held_out, constants))
            curvature = curvature._replace(check=check.loss)
        if state is not None:
            return state, curvature
        stage_key = key if stages == 1 else jax.random.fold_in(key, stage)
        masks = None if stage == 0 and all_free else _adjustable.movable(point.masks, moves, groups)
        fitted = _fitted(estimator, point.params, own, stage_key, masks, on_update)
        _soundness.check_ready(estimator, fitted)
        return fitted, curvature

    def overall_loss(weights: Any) -> jax.Array:
        measured_on = batches if held_out is None else held_out
        own = _with(measured_on, constants_for(weights, batches))
        return curvature_on(own).loss(weights)

    attempt = _goal.attempt_for(
        sparsity, goal, plan, model, params, batches[0], overall_loss if labelled else None,
        sparsities, schedule, before,
    )  # fmt: skip

    def result_of(outcome: walk.Outcome) -> Result:
        point, state, told, stopped = outcome
        try:
            constants = constants_after(len(told), point.params)
        except FloatingPointError as error:  # which costs none of the weights
            constants = None
            stopped = stopped or f"no constants for the weights after stage {len(told)}: {error}"
        report = make_report(
            point.removed, point.masks, groups.chosen, told, stopped, groups.left_out, started
        )
        return Result(point.params, point.masks, report, state, told, stopped, constants)

    def tell(outcome: walk.Outcome) -> None:
        if on_stage is not None:
            on_stage(result_of(outcome))

    return result_of(walk.walk(plan, start, stages, fit_at, attempt, tell, adapt_damping))


def _with(batches: Sequence[Batch], constants: Any | None) -> Sequence[Batch]:
    """Batches with other constants; None leaves them as they are."""
    return batches if constants is None else [(*batch[:2], constants) for batch in batches]
