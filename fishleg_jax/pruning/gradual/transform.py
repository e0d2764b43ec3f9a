"""Gradual pruning while training goes on: an optax transformation that stands last in the chain."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fishleg_jax import _chunks, _labels, _prunable, _tree, fisher, inverse
from fishleg_jax._checks import arrays, numbers
from fishleg_jax._checks.models import check_same_model
from fishleg_jax._devices import axis, placement
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model, check_targets
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning.compensation import _adjustable
from fishleg_jax.pruning.gradual import checks as _gradual_checks
from fishleg_jax.pruning.gradual.counting import Sparsity
from fishleg_jax.pruning.gradual.plan import GradualPlan, Seen
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.gradual.step import make_step
from fishleg_jax.pruning.masks.groups import (
    Groups,
    first_masks,
    make_groups,
    warn_of_zeros,
    zeros_in,
)

START = 32  # batches of which FishLeg starts; training goes on meanwhile
WINDOW = 200  # updates over which its λ is averaged, as the weights move on


def gradual_prune(
    estimator: InverseFisher,
    sparsity: Sparsity,
    *,
    model: Model | None = None,
    prunable: _prunable.Selection = None,
    adjustable: _prunable.Selection = None,
    stacked: _tree.Stacked = None,
    masks: Any | None = "zeros",
    scope: str = "global",
    aux_every: int = 200,
    mask_every: int = 100,
    compensation: _compensation.Compensation | None = None,
    renew: int | None = None,
    regrow: float | Callable[[jax.Array], Any] | None = None,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Prunes during training by Optimal Brain Surgeon, with any estimate of the inverse Fisher.

    As `fishleg_prune`, which says how to use it, but for:

    Args:
        estimator: the inverse Fisher: with `inverse.woodfisher` this is gradual WoodFisher, with
            `inverse.mfac` M-FAC dynamic, with `inverse.identity` gradual magnitude pruning, which
            needs no batch.
        sparsity: see `fishleg_prune`.
        model: whose loss a compensation or `regrow` may want to know; None where they do not.
        prunable: See `fishleg_prune`.
        adjustable: See `fishleg_prune`.
        stacked: See `fishleg_prune`.
        masks: See `fishleg_prune`.
        scope: see `fishleg_prune`.
        aux_every: see `fishleg_prune`.
        mask_every: see `fishleg_prune`.
        compensation: see `fishleg_prune`.
        renew: None for an estimate that is carried on.  Else it is made anew from nothing, of the
            last so many batches before every step that `mask_every` divides and before the end of
            the schedule, and of no others; without all of them no mask is extended.
        regrow: see `fishleg_prune`.
        examples_per_chunk: bounds the memory of what a compensation or `regrow` wants to know of
            the model; the estimator has an argument of the same name for its own.
        axis_name: see `fishleg_prune`; the estimate is made of the examples of all devices.
        seed: see `fishleg_prune`.

    Returns:
        A transformation whose state is a `GradualState`.

    Raises:
        ValueError: an argument out of its range; from `init`, an estimator of another model.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> tx = optax.chain(optax.sgd(0.5), flj.gradual_prune(flj.inverse.identity(), 0.5))
        >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
        >>> updates, state = tx.update(jnp.zeros((2, 2)), tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([[0., 4.],
               [3., 0.]], dtype=float32)
    """
    _chunks.check_chunk(examples_per_chunk, axis_name)
    compensation = _compensation.independent() if compensation is None else compensation
    _gradual_checks.check_arguments(
        estimator, sparsity, scope, compensation, regrow,
        aux_every=aux_every, mask_every=mask_every, renew=renew,
    )  # fmt: skip
    if model is not None:
        check_model(model)
    _gradual_checks.check_others(prunable, adjustable, axis_name, seed)
    _adjustable.check_compensation(compensation, adjustable)
    plan = GradualPlan(
        estimator, sparsity, compensation, scope, aux_every, mask_every, renew, regrow
    )

    def init(params):
        _gradual_checks.check_weights(params)
        arrays.check_params(params)
        _tree.check_names(_tree.named_leaves(params))
        if model is not None:
            check_same_model(estimator.model, model, params)
        groups = make_groups(params, prunable, scope, stacked)
        _gradual_checks.check_sizes(groups.sizes)
        first = first_masks(params, groups, masks)
        if isinstance(masks, str):
            warn_of_zeros(groups, first)
        moves = _adjustable.decide(params, adjustable)
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
        return placement.placement_for(state, params).of(state)

    # compiled here as well, or the conditionals of a step outside of `jit` would be every time
    @functools.partial(jax.jit, static_argnames=("known", "hold"))
    def step(updates, state, params, batch, grad, assimilate, emit, known, hold):
        curvature = None
        if model is not None and batch is not None:
            curvature = fisher.curvature(model, [batch], examples_per_chunk=examples_per_chunk)
            if axis_name is not None:
                curvature = fisher.over_axis(curvature, axis_name)
        if axis_name is not None and batch is not None and estimator.axis_name != axis_name:
            batch = axis.gather(batch, axis_name)
        if grad is not None:
            curvature = fisher.with_gradient(curvature, grad)
        seen = Seen(
            state.count + 1, updates, params, batch, curvature,
            assimilate if known is None else known, True if emit is None else emit, hold,
        )  # fmt: skip
        return make_step(plan, seen, state)

    def update(
        updates, state, params=None, *, batch=None, grad=None, assimilate=None, hold=False,
        emit=None, **extra,
    ):  # fmt: skip
        del extra
        hold = numbers.check_flag(hold, "hold")
        _gradual_checks.check_step(assimilate, hold)
        known = bool(assimilate) if isinstance(assimilate, (bool, np.bool_)) else None
        _gradual_checks.check_weights(params)
        _tree.check_same(params, updates, "updates")
        if grad is not None:
            _tree.check_same(params, grad, "grad")
        if hold:
            return step(updates, state, params, None, None, None, None, False, True)
        _gradual_checks.check_batch(estimator, batch, known)
        if batch is not None and not _labels.has_nan(batch[1]):  # which a step has to survive
            check_targets(model or estimator.model, params, batch)
        flag = assimilate if known is None else None
        return step(updates, state, params, batch, grad, flag, emit, known, False)

    return optax.GradientTransformationExtraArgs(init, update)


def fishleg_prune(
    model: Model,
    sparsity: Sparsity,
    *,
    prunable: _prunable.Selection = None,
    adjustable: _prunable.Selection = None,
    stacked: _tree.Stacked = None,
    masks: Any | None = "zeros",
    scope: str = "global",
    damping: float | None = None,
    aux_every: int = 200,
    aux_optimizer: optax.GradientTransformation | None = None,
    mask_every: int = 100,
    compensation: _compensation.Compensation | None = None,
    estimator: InverseFisher | None = None,
    renew: int | None = None,
    regrow: float | Callable[[jax.Array], Any] | None = None,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Prunes during training by FishLeg: one line at the end of an optax chain.

    At every `aux_every`-th step, and at every one until it is ready, the inverse Fisher is refined
    on the step's batch: from 100 steps before the first weight goes until the last has gone, as far
    as the schedule tells.  Once the schedule asks for more zeros than there are, at the next step
    that `mask_every` divides, the weights are scored where the optimiser would take them, the masks
    extended, and what the other weights do about it is added to the updates.  A pruned weight is
    given an update of exactly minus itself, so that after `optax.apply_updates` it is 0.0, and
    stays it.  Where the schedule stops rising its sparsity is reached at once, whatever the
    intervals: exactly `floor(sparsity · n)` weights, in decimal.

    `update(updates, state, params, *, batch, grad=None, assimilate=None, hold=False)` takes, beside
    what optax hands on:

    - `batch`: `(inputs, targets[, constants])` that the gradient was of.
    - `grad`: the gradient of the loss, which the last in a chain does not see; first-order
      compensations and `regrow` use it.  Without it they make one of the batch.
    - `assimilate`: None for the rule above, as a branch within the step.  True or False from Python
      decides without one, so that a loop can have two compiled steps; XLA for the CPU runs
      gradients of convolutions in a branch many times slower (jax issue 12868).  A traced boolean
      is a further condition.
    - `hold`: True, from Python, for a step that does nothing but hold what is pruned: no batch is
      looked at, and a mask update that was due waits for the next such step without it, which
      `check` tells.  On the CPU a step with a branch over all weights takes longer even where it is
      not taken, so that a loop may compile its step twice and hold where nothing is due.  Something
      is: at the first steps, of which the estimate starts (32 of FishLeg; `estimator.ready` says
      when it is over), at those that `aux_every` or `mask_every` divides, and at that with which
      the schedule ends.
    - `emit`: a boolean, False for a step that is going to be thrown away, at which nothing is
      learned and no mask changed; `MultiSteps` says so.

    It must stand last in the chain, which `check(state)` tells.  `optax.contrib.schedule_free`,
    averages of weights and lookahead keep weights of their own, for which zeros are promised of
    `apply_masks(params, state)`.  Around it use `MultiSteps` of this library; other wrappers have
    to hand on extra arguments, and `optax.masked` is replaced by `prunable`.

    Args:
        model: the model, in evaluation mode.
        sparsity: the fraction of the prunable weights that is zero: a number in [0, 1); a function
            of the step, the first being 1, such as `schedules.cubic` makes; or an array, as by
            `optax.inject_hyperparams(fishleg_prune, static_args=...)`, where all arguments but the
            sparsity must be static.  What is traced is read to six decimals.  The masks never
            shrink, so that a lower sparsity than before changes nothing.  An array does not tell
            what will follow: the first value, and one that stands still for a step, are taken for
            the end of a rise and pruned to at once, others at the steps that `mask_every` divides.
            A constant then prunes as a number does, what is changed by hand a step later; a
            schedule that is injected prunes to its first value, too, and ends a step later.
        prunable: Leaves that may be pruned, decided by `init`: regular expressions over key paths;
            a mapping of these to True or False, where the first match decides; a pytree of booleans
            like the weights, or a prefix of it; or a predicate `(name, leaf) -> bool`.  By default
            all but vectors (at most one dimension larger than 1) and leaves with the name of a
            bias, a normalisation's parameter, an embedding or a position.
        adjustable: Leaves that a compensation may move, given like `prunable`; None for all.  For a
            frozen backbone name the leaves that are trained: the estimate is then fitted to these
            and the prunable ones.
        stacked: Leaves with a leading axis of layers, as `lax.scan` over layers needs, by regular
            expressions or a predicate: with `scope="layer"` each layer has its own threshold, and
            FishLeg gives each its own factors (an `estimator` has the argument itself).
        masks: Weights that are pruned from the start: `"zeros"`, the default, takes the zeros of
            every leaf that is prunable, now or by default (a leaf or layer of zeros only counts as
            untrained, not as pruned); None starts from no mask; or a pytree of booleans like the
            weights, False for pruned.
        scope: `global` for one threshold over all prunable leaves, `layer` for one in each.
        damping: γ of the estimate, see `inverse.fishleg`; measured by default.
        aux_every: between how many steps a batch is assimilated, once the estimate is ready.
        aux_optimizer: of the auxiliary loss, see `inverse.fishleg`.
        mask_every: between how many steps masks are extended.
        compensation: what kept weights do about it, by default `compensation.independent()`.
            `compensation.group()` solves on the step's one batch, to which it can over-fit: its
            step is checked on the same batch.
        estimator: another inverse Fisher; not together with `damping` and `aux_optimizer`, which
            are then its own affair.
        renew: None for an estimate that is carried on.  Else it is made anew from nothing, of the
            last so many batches before every step that `mask_every` divides and before the end of
            the schedule, and of no others; 32 or more here, of which FishLeg starts.
        regrow: which share of the pruned weights may come back at a mask update: those for which
            the estimate promises the largest falls of the loss, `½ g² [F⁻¹]_ii`, where these are
            larger than the scores of as many others that go instead.  They start from 0.0.  A
            number counts where the sparsity rises; a function of the step wherever it is not 0 at a
            step that `mask_every` divides.
        examples_per_chunk: bounds memory: so many examples of a batch are worked on at once.  Not
            together with `axis_name`.
        axis_name: inside `shard_map` or `pmap`, the axis over which each device has a batch of its
            own.  Updates must be the same on all, as with averaged gradients; then masks are.
        seed: of the random numbers of the estimate.

    Returns:
        A transformation whose state, a `GradualState`, is arrays only.  `masks`, `check` and
        `apply_masks` find it in the state of a chain.

    Raises:
        ValueError: an argument out of its range, or a function of the step that raises or returns
            no number, of which one call with a traced step tells; from `init` and `update`,
            parameters that are missing, masked or no floating-point arrays; no batch.

    References:
        Zhu & Gupta, To prune, or not to prune, 2017, for pruning by a schedule; Garcia et al.,
        Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023; Singh & Alistarh,
        WoodFisher, 2020, section 5.2; for `regrow` Guo, Yao & Chen, Dynamic network surgery, 2016,
        and Liu et al., Frequency-domain dynamic pruning, 2018, which prune and re-introduce.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jax.random.normal(jax.random.key(0), (64, 8))
        >>> batch = inputs, inputs @ jnp.array([[3.0, 0, 0, 1, 0, 0, 0, 2]]).T
        >>> schedule = flj.schedules.cubic(0.5, begin=50, end=90)
        >>> pruning = flj.fishleg_prune(model, schedule, mask_every=10, prunable=".*")
        >>> tx = optax.chain(optax.adam(0.1), pruning)
        >>> params = jnp.ones((8, 1))
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state, batch):
        ...     grads = jax.grad(lambda w: flj.loss(model, w, batch))(params)
        ...     updates, state = tx.update(grads, state, params, batch=batch)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(100):
        ...     params, state = step(params, state, batch)
        >>> flj.sparsity(params, ".*"), bool(params[0] > 2.5), flj.check(state).ok
        (0.5, True, True)
    """
    check_model(model)
    if aux_optimizer is not None:
        _gradual_checks.check_optimizer(aux_optimizer, "aux_optimizer", " or None")
    for name, value in (("damping", damping), ("aux_optimizer", aux_optimizer)):
        if estimator is not None and value is not None:
            raise ValueError(
                f"{name} must be None where there is an estimator, to which it can be given; got "
                f"{value!r}"
            )
    if estimator is None:
        if renew is not None and numbers.is_whole(renew, 1) and renew < START:
            raise ValueError(
                f"renew must be at least {START}, the batches of which FishLeg starts, got {renew}"
            )
        estimator = inverse.fishleg(
            model, damping, optimizer=aux_optimizer, start=START, window=WINDOW, probe="sign",
            stacked=stacked, examples_per_chunk=examples_per_chunk, axis_name=axis_name,
        )  # fmt: skip
    return gradual_prune(
        estimator, sparsity, model=model, prunable=prunable, adjustable=adjustable, stacked=stacked,
        masks=masks, scope=scope, aux_every=aux_every,
        mask_every=mask_every, compensation=compensation, renew=renew, regrow=regrow,
        examples_per_chunk=examples_per_chunk, axis_name=axis_name, seed=seed,
    )  # fmt: skip


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


__all__: Sequence[str] = ("fishleg_prune", "gradual_prune")
