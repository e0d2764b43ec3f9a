"""Gradients times an estimate of the inverse Fisher: the natural gradient, for optax chains."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax._checks import arrays
from fishleg_jax._devices import axis, placement
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.gradual.update_checks import check_update, check_weights
from fishleg_jax.training import checks as _checks
from fishleg_jax.training.damping import check_movable
from fishleg_jax.training.grafting import grafted
from fishleg_jax.training.state import NaturalState
from fishleg_jax.training.step import Plan, StepInputs, make_step

Damping = float | jax.Array | Callable[[jax.Array], Any] | str | None


def scale_by_inverse_fisher(
    estimator: InverseFisher,
    *,
    aux_every: int = 5,
    damping: Damping = None,
    momentum: float = 0.9,
    max_fisher_norm: float | Callable[[jax.Array], Any] | None = None,
    grafting: str | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Scales gradients by an estimate of the inverse Fisher, which follows the training.

    The direction is `Q m`: the estimate `Q ≈ (F + γI)⁻¹` times the running mean m of the gradients.
    Every `aux_every` steps, and at every step until it is ready, the estimate assimilates the
    step's batch.  As with all of optax's `scale_by_*`, `optax.scale_by_learning_rate` comes
    behind it in a chain; `fishleg_optimizer` is that chain.

    `update(grads, state, params, *, batch, mask=None, assimilate=None, hold=False)` takes, besides
    the standard arguments of optax:

    - `batch`: `(inputs, targets[, constants])` on which the gradient was taken.  The curvature is
      that of the model in evaluation mode, whatever network the gradient is from: with dropout, or
      with the statistics of the batch.
    - `mask`: Booleans like the parameters, False for pruned weights, which then are no part of the
      Fisher and get directions of 0; None for all weights.
    - `assimilate`: None for the rule above, as a branch within the step.  True or False from Python
      decides without a branch, so that a loop can have two compiled steps; XLA for the CPU runs
      gradients of convolutions in a branch many times slower (jax issue 12868).  A traced boolean
      is a further condition.
    - `hold`: True, from Python, for a step that reads no batch: it takes a direction from the
      estimate as it is.
    - `emit`: Boolean, False for a step that will be discarded; `MultiSteps` of this library sets
      it.

    Args:
        estimator: Estimate of the inverse Fisher: `inverse.kfac` makes this K-FAC,
            `inverse.fishleg` FishLeg, `inverse.identity` gradient descent with momentum.
        aux_every: Steps between batches that the estimate assimilates, once it is ready; 5 by
            default.
        damping: Damping γ in units of the Fisher per example: a positive number, a function of the
            step (counted from 1) or an array by `optax.inject_hyperparams`.  None, the default, for
            the estimate's own.  `"adaptive"` multiplies the estimate's own by a factor (Levenberg
            and Marquardt): it starts at a twentieth of the Fisher's trace, where the estimate knows
            its diagonal.  With every batch that the estimate assimilates the last step is undone on
            that batch, which measures the curvature of the loss along it: the factor grows by 40 %
            if the step went more than twice as far as the minimum along it, and falls as much if it
            ended before, to 3 % of the first.  The state then keeps the weights before the step.
        momentum: Share of the running mean of the gradients that a new gradient leaves, in [0, 1);
            0.9 by default, 0 for none.  The mean is corrected for its start at zero.
        max_fisher_norm: Largest length `√(mᵀQm)` of a direction in the norm of the damped Fisher,
            before the learning rate, a number or a function of the step (counted from 1); longer
            ones are shortened.  None, the default, for no bound.
        grafting: `sgd` or `adam` gives every leaf's direction the length that the step of that
            optimiser, with a learning rate of 1, would have; None, the default, keeps the lengths.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; None
            outside of these.  Gradients must be averaged over the devices already.
        seed: Seed of the estimate's random numbers, 0 by default.

    Returns:
        A transformation whose state, a `NaturalState`, consists of arrays only.  A gradient, batch
        or direction that is not finite is refused: its step is 0, and `failures` counts it.

    Raises:
        ValueError: An argument out of its range, or a function of the step that does not return a
            number; from `init` and `update`, parameters that are missing, masked or not
            floating-point arrays; a missing batch.

    References:
        Garcia et al., Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023;
        Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature,
        ICML 2015, section 6.5 for the adaptive damping; Ba, Grosse & Martens, Distributed
        second-order optimization using Kronecker-factored approximations, ICLR 2017, section 5 for
        the bound on the Fisher norm; Agarwal et al., Learning rate grafting, 2021.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jax.random.normal(jax.random.key(0), (64, 3)) * jnp.array([0.1, 1.0, 10.0])
        >>> batch = inputs, inputs @ jnp.array([1.0, 2.0, 3.0])
        >>> estimator = flj.inverse.diagonal(model, 1e-6)
        >>> tx = optax.chain(
        ...     flj.scale_by_inverse_fisher(estimator, aux_every=1),
        ...     optax.scale_by_learning_rate(0.3),
        ... )
        >>> params = jnp.zeros(3)
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(lambda w: flj.loss(model, w, batch))(params)
        ...     updates, state = tx.update(grads, state, params, batch=batch)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(200):
        ...     params, state = step(params, state)
        >>> params.round(2)
        Array([1., 2., 3.], dtype=float32)
    """
    _checks.check_arguments(
        *(estimator, aux_every, damping, momentum, max_fisher_norm, grafting, axis_name, seed)
    )
    plan = Plan(estimator, aux_every, damping, momentum, max_fisher_norm, grafted(grafting))

    def init(params):
        check_weights(params, _checks.NO_MASKED)
        arrays.check_params(params)
        _tree.check_names(_tree.named_leaves(params))
        wide = _tree.widen(params)
        dtype = jnp.result_type(*jax.tree.leaves(wide))
        count = lambda: jnp.zeros((), jnp.int32)  # noqa: E731  # separate arrays, to be donated
        number = lambda x: jnp.full((), x, dtype)  # noqa: E731
        adaptive = isinstance(damping, str)
        state = NaturalState(
            count=count(),
            momentum=jax.tree.map(jnp.zeros_like, wide),
            weight=number(0.0),
            estimate=estimator.init(params),
            key=jax.random.key_data(jax.random.key(seed)),
            assimilated=count(),
            failures=count(),
            damping=number(jnp.nan),
            fisher_norm=number(0.0),
            length=number(0.0),
            factor=number(1.0),
            least=number(0.0),
            ratio=number(jnp.nan),
            before=jax.tree.map(jnp.copy, params) if adaptive else None,
            graft=() if plan.graft is None else plan.graft.init(wide),
        )
        check_movable(damping, state.estimate)
        return placement.placement_for(state, params).of(state)

    # Compiled here as well; outside of `jit` a step's conditionals would be recompiled every time.
    @functools.partial(jax.jit, static_argnames=("known", "hold"))
    def step(updates, state, params, batch, mask, assimilate, emit, known, hold):
        whole = batch
        if axis_name is not None and batch is not None and estimator.axis_name != axis_name:
            whole = axis.gather(batch, axis_name)
        return make_step(
            plan,
            StepInputs(
                state.count + 1,
                updates,
                params,
                whole,
                mask,
                assimilate if known is None else known,
                True if emit is None else emit,
                hold,
                None if batch is None else (batch, axis_name),
            ),
            state,
        )

    def update(
        updates,
        state,
        params=None,
        *,
        batch=None,
        mask=None,
        assimilate=None,
        hold=False,
        emit=None,
        **extra,
    ):
        del extra
        trees = {"grads": updates, "mask": mask}
        known = check_update(
            *(estimator, estimator.model, params, batch, assimilate, hold),
            trees=trees,
            advice=_checks.NO_MASKED,
        )
        if hold:
            return step(updates, state, params, None, mask, None, None, False, True)
        flag = assimilate if known is None else None
        return step(updates, state, params, batch, mask, flag, emit, known, False)

    return optax.GradientTransformationExtraArgs(init, update)
