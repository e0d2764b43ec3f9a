"""Gradual pruning by FishLeg: one line at the end of an optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from fishleg_jax import _prunable, inverse
from fishleg_jax._checks import numbers
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning.gradual import checks as _gradual_checks
from fishleg_jax.pruning.gradual.counting import Sparsity
from fishleg_jax.pruning.gradual.transform import gradual_prune
from fishleg_jax.pruning.leaves import Leaves, leaves_of

START = 32  # batches of which FishLeg starts; training goes on meanwhile
WINDOW = 200  # updates over which its λ is averaged, as the weights move on


def fishleg_prune(
    model: Model,
    sparsity: Sparsity,
    *,
    prunable: _prunable.LeafSelection | Leaves = None,
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
            bias, a normalisation's parameter, an embedding or a position.  `flj.Leaves`
            adds leaves that a compensation may move (of a frozen backbone those that are trained)
            and stacked layers, to which FishLeg gives factors of their own (an `estimator` has
            the argument `stacked` itself).
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
            model,
            damping,
            optimizer=aux_optimizer,
            start=START,
            window=WINDOW,
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
        examples_per_chunk=examples_per_chunk,
        axis_name=axis_name,
        seed=seed,
    )
