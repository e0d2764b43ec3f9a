"""Gradual pruning during training: an optax transformation that stands last in the chain."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _chunks, _curvature, _prunable, _tree
from fishleg_jax._checks import arrays
from fishleg_jax._devices import axis, placement
from fishleg_jax._same_model import check_same_model
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model, losses
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning.compensation import _adjustable
from fishleg_jax.pruning.gradual import checks as _gradual_checks
from fishleg_jax.pruning.gradual import shadow as _shadow
from fishleg_jax.pruning.gradual import update_checks
from fishleg_jax.pruning.gradual.choice import candidates
from fishleg_jax.pruning.gradual.counting import Sparsity
from fishleg_jax.pruning.gradual.plan import GradualPlan, StepInputs, groups_in
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.gradual.step import make_step
from fishleg_jax.pruning.leaves import Leaves, leaves_of
from fishleg_jax.pruning.masks.along import warn_of_axes
from fishleg_jax.pruning.masks.densities import Scope
from fishleg_jax.pruning.masks.groups import (
    Groups,
    first_masks,
    make_groups,
    warn_of_zeros,
    zeros_in,
)
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.masks.targets import target_of
from fishleg_jax.pruning.scores import Saliency, check_saliency


def gradual_prune(
    estimator: InverseFisher,
    sparsity: Sparsity | None,
    *,
    model: Model | None = None,
    prunable: _prunable.LeafSelection | Leaves = None,
    masks: Any | None = "zeros",
    scope: Scope = "global",
    aux_every: int = 200,
    mask_every: int = 100,
    compensation: _compensation.Compensation | None = None,
    renew: int | None = None,
    regrow: float | Callable[[jax.Array], Any] | None = None,
    saliency: Saliency = "auto",
    training_model: Model | None = None,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
    seed: int = 0,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes during training by Optimal Brain Surgeon, with any estimate of the inverse Fisher.

    Takes the same steps as `fishleg_prune`, where `update` and its extra arguments are described.

    Args:
        estimator: Estimate of the inverse Fisher: `inverse.woodfisher` makes this gradual
            WoodFisher, `inverse.mfac` M-FAC dynamic, `inverse.identity` gradual magnitude pruning,
            which needs no batch.
        sparsity: Fraction of the prunable weights that is zero: a number in [0, 1), a function of
            the step (the first is 1) such as `schedules.cubic` returns, or an array by
            `optax.inject_hyperparams`; None for what a pattern of n:m, or densities by name, give.
        model: Model whose loss a choice, a compensation or `regrow` needs; None, the default, for
            the estimator's.
        prunable: Leaves that may be pruned, decided by `init`: regular expressions over key paths,
            a mapping of these to booleans, a pytree of booleans, a predicate
            `(name, leaf) -> bool`, or `flj.Leaves`; by default all but vectors, biases,
            normalisations, embeddings and positions.
        masks: Weights that are pruned from the start: `"zeros"`, the default, takes the zeros of
            prunable leaves; None starts without masks; or a pytree of booleans, False for pruned.
        scope: `global`, the default, for one threshold over all prunable leaves, `layer` for one in
            each; `erk` for densities of the leaves by their dimensions, or a mapping from regular
            expressions over key paths to densities, as in `make_masks`.
        aux_every: Steps between curvature updates, once the estimate is ready; 200 by default.
        mask_every: Steps between mask updates, 100 by default.
        compensation: Change of the kept weights that makes up for the pruned ones, one of
            `flj.compensation`; `independent()` by default.
        renew: None for an estimate that is carried on.  Otherwise the number of batches from which
            it is fitted from scratch before every step divisible by `mask_every` and before the end
            of the schedule, ignoring all other batches; masks are extended only after all of them.
        regrow: Share in [0, 1] of the pruned weights that may come back at a mask update, a number
            or a function of the step; None for none of them.  With `magnitude`, and with any scores
            by `inverse.identity()`, pruned weights go on being updated in a copy, the state's
            `shadow`, and come back with the value there if its magnitude is above that of others.
            With `obs`, `obd` and `mixture` those come back, at 0.0, for which the estimate predicts
            the largest falls of the loss; `auto` and functions are as in `fishleg_prune`.
        saliency: Scores of the weights: `magnitude`, `obd`, `obs`, `mixture`, a function
            `(params, masks, estimator, state, gradient) -> scores`, or `auto`, which chooses at
            every mask update by the loss on its batch, as `fishleg_prune` describes.
        training_model: Model in training mode, whose loss `auto` compares, as in `fishleg_prune`;
            None, the default, for `model`, which has to be known.
        examples_per_chunk: Number of examples processed at a time for a compensation or `regrow`,
            which bounds memory; None for a whole batch.  The estimator has its own argument of the
            same name.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; None
            outside of these.  The estimate is fitted to the examples of all devices.
        seed: Seed of the estimate's random numbers, 0 by default.
        pattern: Weights that are pruned together, one of `flj.patterns`: n of every m, blocks, or
            whole units; None, the default, for single weights.  Groups are scored with their own
            blocks of the inverse Fisher, `½ w_Bᵀ [(F⁻¹)_BB]⁻¹ w_B`, or of the Fisher, and pruned
            whole, those with the lowest scores per weight first.
            With n of m a mask update prunes the groups with the lowest scores to n of m, more of
            them as the sparsity rises, which may be None for `1 - n/m` at once.

    Returns:
        A transformation whose state is a `GradualState`.

    Raises:
        ValueError: An argument out of its range; from `init`, an estimator of another model.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> tx = optax.chain(optax.sgd(0.5), flj.gradual_prune(flj.inverse.identity(), 0.5))
        >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
        >>> updates, state = tx.update(jnp.zeros((2, 2)), tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([[0., 4.],
               [3., 0.]], dtype=float32)
    """
    # Reject invalid arguments before anything is compiled.
    _chunks.check_chunk(examples_per_chunk, axis_name)
    compensation = _compensation.independent() if compensation is None else compensation
    _gradual_checks.check_arguments(
        estimator,
        sparsity,
        scope,
        compensation,
        regrow,
        aux_every=aux_every,
        mask_every=mask_every,
        renew=renew,
        pattern=pattern,
    )
    model = estimator.model if model is None else model
    if model is not None:
        check_model(model)
    if training_model is not None:
        check_model(training_model, "training_model")
    leaves = leaves_of(prunable)
    _gradual_checks.check_others(leaves, axis_name, seed)
    _adjustable.check_compensation(compensation, leaves.adjustable)
    check_saliency(saliency, estimator)
    plan = GradualPlan(
        *(estimator, sparsity, compensation, scope, aux_every, mask_every, renew, regrow, saliency),
        pattern,
    )

    def init(params):
        # Check the weights.
        update_checks.check_weights(params)
        arrays.check_params(params)
        _tree.check_names(_tree.named_leaves(params))
        if model is not None:
            check_same_model(estimator.model, model, params)
        # Decide which leaves are pruned, and which weights are pruned from the start.
        groups = make_groups(params, leaves.prunable, scope, leaves.stacked, pattern)
        target_of(groups, _gradual_checks.end_of(sparsity))
        _gradual_checks.check_sizes(groups)
        first = first_masks(params, groups, masks)
        if isinstance(masks, str):
            warn_of_zeros(groups, first)
        moves = _adjustable.decide(params, leaves.adjustable)
        # Start with counters at zero, placed like the weights.
        state = GradualState(
            count=jnp.zeros((), jnp.int32),
            masks=first,
            estimate=estimator.init(params),
            key=jax.random.key_data(jax.random.key(seed)),
            assimilated=jnp.zeros((), jnp.int32),
            latest=jnp.zeros((), jnp.int32),
            asked=jnp.full((), jnp.nan, jnp.float32),
            pruned=jnp.stack(zeros_in(groups, first)),
            weights=_sizes(groups),
            adjustable=None if moves is None else _named(groups, moves),
            violations=jnp.zeros((), jnp.int32),
            failures=jnp.zeros((), jnp.int32),
            overdue=jnp.zeros((), jnp.int32),
        )
        if saliency == "auto":
            names = map(str, candidates(estimator, state.estimate))
            state = state._replace(chosen={name: jnp.zeros((), jnp.int32) for name in names})
        if _shadow.has_shadow(regrow, saliency, estimator):
            state = state._replace(shadow=_shadow.first(params, groups, first))
        return placement.placement_for(state, params).of(state)

    # Compiled here as well; outside of `jit` a step's conditionals would be recompiled every time.
    @functools.partial(jax.jit, static_argnames=("known", "hold"))
    def step(updates, state, params, batch, grad, assimilate, emit, known, hold):
        # Losses example by example, if they decide on scores.
        each = None
        if saliency == "auto" and model is not None and batch is not None and batch[1] is not None:
            judge, chunk = model, examples_per_chunk
            if training_model is not None:  # with the statistics of this device's whole batch
                judge, chunk = training_model, None
            each = functools.partial(_losses, judge, batch, chunk, axis_name)
        # Curvature of the batch, averaged over devices, with the gradient if it was passed.
        curvature = None
        if model is not None and batch is not None:
            warn_of_axes(groups_in(plan, state, params), model, params, batch)
            curvature = _curvature.curvature(model, [batch], examples_per_chunk=examples_per_chunk)
            if axis_name is not None:
                curvature = _curvature.over_axis(curvature, axis_name)
        if axis_name is not None and batch is not None and estimator.axis_name != axis_name:
            batch = axis.gather(batch, axis_name)
        if grad is not None:
            curvature = _curvature.with_gradient(curvature, grad)
        # Collect the inputs of the step, and make it.
        inputs = StepInputs(
            state.count + 1,
            updates,
            params,
            batch,
            curvature,
            assimilate if known is None else known,
            True if emit is None else emit,
            hold,
            each,
            axis_name,
        )
        return make_step(plan, inputs, state)

    def update(
        updates,
        state,
        params=None,
        *,
        batch=None,
        grad=None,
        assimilate=None,
        hold=False,
        emit=None,
        **extra,
    ):
        del extra
        trees = {"updates": updates, "grad": grad}
        known = update_checks.check_update(estimator, model, params, batch, assimilate, hold, trees)
        if not hold and training_model is not None:
            update_checks.check_fit(training_model, params, batch, "batch, under training_model,")
        if hold:
            return step(updates, state, params, None, None, None, None, False, True)
        flag = assimilate if known is None else None
        return step(updates, state, params, batch, grad, flag, emit, known, False)

    return optax.GradientTransformationExtraArgs(init, update)


def _losses(
    model: Model, batch: Any, examples_per_chunk: int | None, axis_name: str | None, params: Any
) -> jax.Array:
    """Losses of the examples of this device, in nats."""
    params = axis.varying(params, axis_name)
    return losses(model, params, batch, examples_per_chunk=examples_per_chunk)


def _sizes(groups: Groups) -> dict[str, jax.Array]:
    """Number of weights of every prunable leaf by name; of a stacked leaf, of each layer."""
    sizes = {}
    for i, name in enumerate(groups.names):
        if groups.chosen[i]:
            layers = groups.shapes[i][0] if groups.stacked[i] else 1
            each = jnp.asarray(groups.size(i) // max(layers, 1), jnp.int32)
            sizes[name] = jnp.full((layers,), each) if groups.stacked[i] else each
    return sizes


def _named(groups: Groups, moves: Sequence[bool]) -> dict[str, jax.Array]:
    return {name: jnp.array(True) for name, yes in zip(groups.names, moves, strict=True) if yes}
