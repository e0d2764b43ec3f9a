"""Gradual pruning by FishLeg: one line at the end of an optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from fishleg_jax import _prunable, _text, inverse
from fishleg_jax._checks import numbers
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning.gradual import checks as _gradual_checks
from fishleg_jax.pruning.gradual.counting import Sparsity
from fishleg_jax.pruning.gradual.transform import gradual_prune
from fishleg_jax.pruning.leaves import Leaves, leaves_of
from fishleg_jax.pruning.masks.densities import Scope
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.scores import Saliency

START = 32  # batches from which FishLeg starts, while training goes on
WINDOW = 200  # updates over which a learned λ is averaged, as the weights keep moving


def fishleg_prune(
    model: Model,
    sparsity: Sparsity | None,
    *,
    prunable: _prunable.LeafSelection | Leaves = None,
    masks: Any | None = "zeros",
    scope: Scope = "global",
    damping: float | None = None,
    aux_every: int = 200,
    aux_optimizer: optax.GradientTransformation | None = None,
    mask_every: int = 100,
    compensation: _compensation.Compensation | None = None,
    estimator: InverseFisher | None = None,
    renew: int | None = None,
    regrow: float | Callable[[jax.Array], Any] | None = None,
    saliency: Saliency = "auto",
    training_model: Model | None = None,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
    seed: int = 0,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes during training by FishLeg: one line at the end of an optax chain.

    Every `aux_every` steps, and at every step until it is ready, the inverse Fisher is refined on
    the step's batch: from 100 steps before the first weight is pruned until the last one is, as far
    as the schedule is known.  Once the schedule asks for more zeros than there are, at the next
    step divisible by `mask_every`, the weights are scored where the optimiser would take them, the
    masks are extended, and the compensation is added to the updates.  A pruned weight gets an
    update of exactly minus itself, so that after `optax.apply_updates` it is 0.0, and stays 0.0.
    When the schedule stops rising, its sparsity is reached at once, whatever the intervals: exactly
    `floor(sparsity · n)` weights, in decimal.

    `update(updates, state, params, *, batch, grad=None, assimilate=None, hold=False)` takes,
    besides the standard arguments of optax:

    - `batch`: `(inputs, targets[, constants])` on which the gradient was taken.
    - `grad`: Gradient of the loss, which the last transformation of a chain does not see; used by
      first-order compensations and `regrow`.  None computes it on the batch.
    - `assimilate`: None for the rule above, as a branch within the step.  True or False from Python
      decides without a branch, so that a loop can have two compiled steps; XLA for the CPU runs
      gradients of convolutions in a branch many times slower (jax issue 12868).  A traced boolean
      is a further condition.
    - `hold`: True, from Python, for a step that only holds pruned weights at zero: it reads no
      batch, and a mask update that was due waits for the next such step without `hold`, which
      `check` reports.  On the CPU a step with a branch over all weights takes longer even if the
      branch is not taken, so a loop may compile its step twice and hold when nothing is due.  Work
      is due at the first steps, from which the estimate starts (32 for FishLeg; `estimator.ready`
      says when it is over), at those divisible by `aux_every` or `mask_every`, and at the one with
      which the schedule ends.
    - `emit`: Boolean, False for a step that will be discarded, at which the estimate learns nothing
      and masks stay; `MultiSteps` sets it.

    It must stand last in the chain; `check(state)` reports if it does not.
    `optax.contrib.schedule_free`, averages of weights and lookahead keep weights of their own; only
    `apply_masks(params, state)` guarantees zeros in these.  Wrap it with `MultiSteps` of this
    library; other wrappers have to pass extra arguments on, and `prunable` replaces `optax.masked`.

    Args:
        model: Model, in evaluation mode.
        sparsity: Fraction of the prunable weights that is zero: a number in [0, 1); a function of
            the step, counted from 1, such as `schedules.cubic` returns; or an array, as by
            `optax.inject_hyperparams(fishleg_prune, static_args=...)`, where all arguments but the
            sparsity must be static.  Traced values are read to six decimals.  The masks never
            shrink, so a lower sparsity than before changes nothing.  An array does not reveal what
            follows: the first value, and one that stays the same for a step, count as the end of a
            rise and are pruned to at once, others at the steps divisible by `mask_every`.  A
            constant then prunes as a number does, and a change by hand takes effect one step later;
            an injected schedule also prunes to its first value, and ends a step later.
        prunable: Leaves that may be pruned, decided by `init`: regular expressions over key paths;
            a mapping of these to True or False, where the first match decides; a pytree of booleans
            like the weights, or a prefix of it; or a predicate `(name, leaf) -> bool`.  By default
            all but vectors (at most one dimension larger than 1) and leaves with the name of a
            bias, a normalisation's parameter, an embedding or a position.  `flj.Leaves` adds leaves
            that a compensation may move (the trained ones if the backbone is frozen) and stacked
            layers, for which FishLeg has separate factors (an `estimator` has the argument
            `stacked` itself).
        masks: Weights that are pruned from the start: `"zeros"`, the default, takes the zeros of
            every leaf that is prunable, now or by default (an all-zero leaf or layer counts as
            untrained, not as pruned); None starts without masks; or a pytree of booleans like the
            weights, False for pruned.
        scope: `global`, the default, for one threshold over all prunable leaves, `layer` for one in
            each; `erk` for densities of the leaves by their dimensions, or a mapping from regular
            expressions over key paths to densities, as in `make_masks`.
        damping: Damping γ of the estimate, in units of the Fisher per example; None measures it.
        aux_every: Steps between curvature updates, once the estimate is ready; 200 by default.
        aux_optimizer: Optimiser of FishLeg's auxiliary loss; None for the default of
            `inverse.fishleg`.
        mask_every: Steps between mask updates, 100 by default.
        compensation: Change of the kept weights that makes up for the pruned ones, one of
            `flj.compensation`; `independent()` by default.  `group()` solves on the step's one
            batch, to which it can over-fit: its step is checked on the same batch.
        estimator: Another estimate of the inverse Fisher; None for FishLeg.  Not together with
            `damping` and `aux_optimizer`, which are then arguments of the estimator.
        renew: None for an estimate that is carried on.  Otherwise the number of batches from which
            it is fitted from scratch before every step divisible by `mask_every` and before the end
            of the schedule, ignoring all other batches; at least 32 for FishLeg, the number from
            which it starts.
        regrow: Share in [0, 1] of the pruned weights that may come back at a mask update; None for
            none of them.  Those with the highest scores come back, if these are higher than the
            scores of as many others, which are pruned instead.  With `obs`, `obd` and `mixture` a
            pruned weight's score is the fall of the loss that the estimate predicts, `½ g²
            [F⁻¹]_ii`, and it starts from 0.0.  With `magnitude` pruned weights go on being updated
            in a copy, the state's `shadow`, from the value at which they were pruned; their scores
            are those of the copy, and a weight comes back with the value there.  So it is for all
            scores by `inverse.identity()`.  `auto`, for its magnitudes, and functions score a
            pruned weight at a Newton step from 0, `−[F⁻¹]_ii g`; it starts from 0.0.  A number
            applies while the sparsity rises; a function of the step whenever it is not 0 at a step
            divisible by `mask_every`.
        saliency: Scores of the weights: `magnitude`, half the square of a weight; `obd`, that times
            the Fisher's diagonal; `obs`, divided by the diagonal of the inverse; `mixture`, the
            geometric mean of both; or a function `(params, masks, estimator, state, gradient) ->
            scores`, jit-compatible, with the state prepared for products and a gradient of None.
            `auto` chooses at every mask update: magnitude, the others, and `obs` at 10 and 100
            times the damping prune as many weights of each leaf as magnitude would, each with and
            without the compensation, and the lowest loss on the step's batch wins, among those that
            are better than magnitude without compensation by four standard errors of the
            difference.  The state's `chosen` counts who won.  Without labels it stands for `obs`.
        training_model: Model in training mode, of the same weights and batches, whose loss `auto`
            compares: with batch norm, one that normalises by the batch's own statistics, as the
            training does.  Stored ones are out of date once a mask has grown, which favours masks
            that move them least.  It sees the whole batch of a device at once, whatever
            `examples_per_chunk`; scores other than `auto` do not need it.  None, the default, for
            `model`.
        examples_per_chunk: Number of examples processed at a time, which bounds memory; None for a
            whole batch.  Not together with `axis_name`.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; None
            outside of these.  Updates must be the same on all devices, as with averaged gradients;
            then the masks are, too.
        seed: Seed of the estimate's random numbers, 0 by default.
        pattern: Weights that are pruned together, one of `flj.patterns`: n of every m, blocks, or
            whole units; None, the default, for single weights.  Groups are scored with their own
            blocks of the inverse Fisher, `½ w_Bᵀ [(F⁻¹)_BB]⁻¹ w_B`, or of the Fisher, and pruned
            whole, those with the lowest scores per weight first.
            With n of m a mask update prunes the groups with the lowest scores to n of m, more of
            them as the sparsity rises, which may be None for `1 - n/m` at once.

    Returns:
        A transformation whose state, a `GradualState`, consists of arrays only.  `masks`, `check`
        and `apply_masks` find it in the state of a chain.

    Raises:
        ValueError: An argument out of its range, or a function of the step that raises or does not
            return a number, as one call with a traced step shows; from `init` and `update`,
            parameters that are missing, masked or not floating-point arrays; a missing batch.

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
    # Reject arguments of FishLeg beside another estimator.
    check_model(model)
    if aux_optimizer is not None:
        _gradual_checks.check_optimizer(aux_optimizer, "aux_optimizer", " or None")
    for name, value in (("damping", damping), ("aux_optimizer", aux_optimizer)):
        if estimator is not None and value is not None:
            raise ValueError(
                f"{name} must be None if an estimator is given, got "
                f"{_text.shown(value)}: pass it to the "
                "estimator instead"
            )
    # Build the FishLeg estimate, which follows the moving weights: in closed form, or by learning.
    if estimator is None:
        if renew is not None and numbers.is_whole(renew, 1) and renew < START:
            raise ValueError(
                f"renew must be at least {START}, the number of batches in FishLeg's start, got "
                f"{renew}"
            )
        estimator = inverse.fishleg(
            model,
            damping,
            optimizer=aux_optimizer,
            learn=aux_optimizer is not None,
            start=START,
            window=START if aux_optimizer is None else WINDOW,
            probe="sign",
            stacked=leaves_of(prunable).stacked,
            examples_per_chunk=examples_per_chunk,
            axis_name=axis_name,
        )
    return gradual_prune(
        estimator,
        sparsity,
        model=model,
        prunable=prunable,
        masks=masks,
        scope=scope,
        aux_every=aux_every,
        mask_every=mask_every,
        compensation=compensation,
        renew=renew,
        regrow=regrow,
        saliency=saliency,
        training_model=training_model,
        examples_per_chunk=examples_per_chunk,
        axis_name=axis_name,
        seed=seed,
        pattern=pattern,
    )
