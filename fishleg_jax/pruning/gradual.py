"""Gradual pruning while training goes on: an optax transformation that stands last in the chain."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fishleg_jax import _axis, _tree, _validate, fisher, inverse
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model
from fishleg_jax.pruning import _gradual_checks
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning._counting import Sparsity
from fishleg_jax.pruning._gradual_state import Check, GradualState, check, masks
from fishleg_jax.pruning._gradual_step import Plan, Seen, make_step
from fishleg_jax.pruning._gradual_wrapper import MultiSteps, PruneState, wrap

START = 32  # batches of which FishLeg starts; training goes on meanwhile
WINDOW = 200  # updates over which its λ is averaged, as the weights move on


def gradual_prune(
    estimator: InverseFisher,
    sparsity: Sparsity,
    *,
    model: Model | None = None,
    prunable: _tree.Selection = None,
    scope: str = "global",
    aux_every: int = 10,
    mask_every: int = 50,
    compensation: _compensation.Compensation | None = None,
    renew: int | None = None,
    regrow: float | Callable[[jax.Array], Any] | None = None,
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
        prunable: see `fishleg_prune`.
        scope: see `fishleg_prune`.
        aux_every: see `fishleg_prune`.
        mask_every: see `fishleg_prune`.
        compensation: see `fishleg_prune`.
        renew: None for an estimate that is carried on.  Else it is made anew from nothing, of the
            last so many batches before every step that `mask_every` divides, and of no others.
        regrow: see `fishleg_prune`.
        axis_name: see `fishleg_prune`; the estimate is made of the examples of all devices.
        seed: see `fishleg_prune`.

    Returns:
        A transformation whose state is a `GradualState`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> tx = optax.chain(optax.sgd(0.5), flj.gradual_prune(flj.inverse.identity(), 0.5))
        >>> params = jnp.array([[1.0, 4.0], [3.0, 2.0]])
        >>> updates, state = tx.update(jnp.zeros((2, 2)), tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([[0., 4.],
               [3., 0.]], dtype=float32)
    """
    compensation = _compensation.independent() if compensation is None else compensation
    _gradual_checks.check_arguments(
        estimator, sparsity, scope, compensation, regrow,
        aux_every=aux_every, mask_every=mask_every, renew=renew,
    )  # fmt: skip
    plan = Plan(
        estimator, sparsity, compensation, prunable, scope, aux_every, mask_every, renew, regrow
    )  # fmt: skip

    def init(params):
        _gradual_checks.check_weights(params, prunable)
        _validate.check_params(params)
        chosen = _tree.select(params, prunable, "prunable")
        return GradualState(
            count=jnp.zeros((), jnp.int32),
            masks=jax.tree.map(lambda p: jnp.ones(p.shape, bool), params),
            estimate=estimator.init(params),
            key=jax.random.key_data(jax.random.key(seed)),
            assimilated=jnp.zeros((), jnp.int32),
            asked=jnp.full((), jnp.nan, jnp.float32),
            weights=jnp.asarray(sum(_tree.chosen_sizes(params, chosen)), jnp.int32),
            violations=jnp.zeros((), jnp.int32),
            failures=jnp.zeros((), jnp.int32),
        )

    def update(
        updates, state, params=None, *, batch=None, grad=None, assimilate=None, emit=True, **extra
    ):
        del extra
        _gradual_checks.check_weights(params, prunable)
        _gradual_checks.check_batch(estimator, batch, assimilate)
        curvature = None
        if model is not None and batch is not None:
            curvature = fisher.curvature(model, [batch])
            if axis_name is not None:
                curvature = fisher.over_axis(curvature, axis_name)
        if axis_name is not None and batch is not None and estimator.axis_name != axis_name:
            batch = _axis.gather(batch, axis_name)
        if grad is not None:
            curvature = fisher.with_gradient(curvature, grad)
        if isinstance(assimilate, np.bool_):
            assimilate = bool(assimilate)
        seen = Seen(updates, params, batch, curvature, assimilate, emit)
        return make_step(plan, seen, state)

    return optax.GradientTransformationExtraArgs(init, update)


def fishleg_prune(
    model: Model,
    sparsity: Sparsity,
    *,
    prunable: _tree.Selection = None,
    scope: str = "global",
    damping: float | None = None,
    aux_every: int = 10,
    aux_optimizer: optax.GradientTransformation | None = None,
    mask_every: int = 50,
    compensation: _compensation.Compensation | None = None,
    estimator: InverseFisher | None = None,
    renew: int | None = None,
    regrow: float | Callable[[jax.Array], Any] | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Prunes during training, with a FishLeg estimate that is refined as training goes on."""
    if estimator is None:
        estimator = inverse.fishleg(
            model, damping, optimizer=aux_optimizer, start=START, window=WINDOW,
            axis_name=axis_name,
        )  # fmt: skip
    return gradual_prune(
        estimator, sparsity, model=model, prunable=prunable, scope=scope, aux_every=aux_every,
        mask_every=mask_every, compensation=compensation, renew=renew, regrow=regrow,
        axis_name=axis_name, seed=seed,
    )  # fmt: skip


def prune(
    inner: optax.GradientTransformation, model: Model, sparsity: Sparsity, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """An optimiser with pruning around it."""
    return wrap(inner, fishleg_prune(model, sparsity, **options))


__all__: Sequence[str] = (
    "Check",
    "GradualState",
    "MultiSteps",
    "PruneState",
    "check",
    "fishleg_prune",
    "gradual_prune",
    "masks",
    "prune",
)
