"""FishLeg as an optimiser: the natural gradient, weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree, inverse
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model
from fishleg_jax.training import checks as _checks
from fishleg_jax.training.precondition import Damping, scale_by_inverse_fisher
from fishleg_jax.training.sharing import Prune, shared

WINDOW = 40  # assimilated batches in the running means
STEP = 0.5  # largest length of a step in the norm of the Fisher
TINY = 1e-30  # learning rate below which steps count as none


def scale_by_fishleg(
    model: Model,
    *,
    rank: int | None = 64,
    aux_every: int = 5,
    damping: Damping = "adaptive",
    momentum: float = 0.9,
    max_fisher_norm: float | None = 1.0,
    grafting: str | None = None,
    stacked: _tree.Stacked = None,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Scales gradients by FishLeg's estimate of the inverse Fisher, which follows the training.

    `scale_by_inverse_fisher` with `inverse.fishleg` in the form for training: low-rank factors, of
    which no second moments are formed and no large matrices decomposed, and one Fisher sample, the
    gradient of a single backward pass, from each batch that it assimilates.  `update` takes
    `batch=(inputs, targets[, constants])`, and the other extra arguments described there.

    Args:
        model: Model in evaluation mode, whose Fisher is estimated.
        rank: Number of eigenvectors of each axis of a kernel in Q, at most its size; 64 by default,
            None for whole axes.  A product costs about `4·rank/(3·batch)` of a gradient.
        aux_every: Steps between batches that the estimate assimilates, once it is ready; 5 by
            default.
        damping: Damping γ in units of the Fisher per example: a positive number, a function of the
            step (counted from 1), an array by `optax.inject_hyperparams`, or None for the
            estimate's own, which suits pruning and is far too small at a random start.
            `"adaptive"`, the default, starts at a twentieth of the Fisher's trace, and follows the
            measured curvature of the loss along the steps.
        momentum: Share of the running mean of the gradients that a new gradient leaves, in [0, 1);
            0.9 by default.
        max_fisher_norm: Largest length `√(mᵀQm)` of a direction in the norm of the damped Fisher,
            before the learning rate, or a function of the step; 1 by default, None for no bound.
            The predictions change by at most about half the square of `learning_rate ·
            max_fisher_norm`, in nats per example.
        grafting: `sgd` or `adam` gives every leaf's direction the length that the step of that
            optimiser, with a learning rate of 1, would have; None, the default, keeps the lengths.
        stacked: Leaves with a leading axis of layers, as from `nn.scan` and `lax.scan`: regular
            expressions over key paths, or a predicate `(name, leaf) -> bool`.  Each layer gets its
            own factors.  None if no leaf is stacked.
        examples_per_chunk: Number of examples processed at a time for curvature, which bounds the
            memory of activations; None for the whole batch.  Not together with `axis_name`.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; None
            outside of these.  Gradients must be averaged over the devices already.
        seed: Seed of the estimate's random numbers, 0 by default.

    Returns:
        A transformation with the sign of all `scale_by_*`, whose state is a `NaturalState`.

    Raises:
        ValueError: An argument out of its range; from `init` and `update`, parameters that are
            missing, masked or not floating-point arrays; a missing batch.

    References:
        Garcia et al., Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> scales = jnp.array([0.1, 1.0, 10.0])
        >>> inputs = jax.random.normal(jax.random.key(0), (64, 3)) * scales
        >>> batch = inputs, inputs @ jnp.ones((3, 2))
        >>> params = jnp.zeros((3, 2))
        >>> grads = jax.grad(lambda w: flj.loss(model, w, batch))(params)
        >>> tx = flj.scale_by_fishleg(model)
        >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        >>> uneven = lambda x: float(jnp.abs(x[2] / x[0]).mean())
        >>> uneven(updates) < uneven(grads) / 10
        True
    """
    estimator = streaming(
        model,
        rank,
        stacked=stacked,
        examples_per_chunk=examples_per_chunk,
        axis_name=axis_name,
    )
    return scale_by_inverse_fisher(
        estimator,
        aux_every=aux_every,
        damping=damping,
        momentum=momentum,
        max_fisher_norm=max_fisher_norm,
        grafting=grafting,
        axis_name=axis_name,
        seed=seed,
    )


def streaming(model: Model, rank: int | None, **options: Any) -> InverseFisher:
    """FishLeg's estimate for training: low-rank factors, and one Fisher sample from each batch."""
    check_model(model)
    return inverse.fishleg(
        model, factors=_factors.low_rank, cap=rank, samples=1, window=WINDOW, **options
    )


def fishleg_optimizer(
    model: Model,
    learning_rate: float | jax.Array | Callable[[jax.Array], Any],
    *,
    weight_decay: float = 0.0,
    estimator: InverseFisher | None = None,
    prune: Prune | None = None,
    rank: int | None = 64,
    aux_every: int = 5,
    damping: Damping = "adaptive",
    momentum: float = 0.9,
    max_fisher_norm: float | None = STEP,
    grafting: str | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """FishLeg as an optimiser: the natural gradient, weight decay, and a learning rate.

    A chain of `scale_by_fishleg`, decoupled weight decay and `optax.scale_by_learning_rate`; with
    an `estimator` of `scale_by_inverse_fisher` in place of the first.  `update` takes
    `batch=(inputs, targets[, constants])`, on which the gradient was taken, and the other extra
    arguments that `scale_by_inverse_fisher` describes.

    With `prune` it prunes as well, by the estimate that it trains with.  Transformations of a chain
    cannot see each other's states, so both are then one transformation: the optimiser assimilates
    batches, on the weights that survive, and lends its estimate to the pruning, which computes no
    curvature of its own; its arguments `aux_every`, `aux_optimizer`, `damping` and `renew` have
    nothing to do.  The damping of the pruning is the estimate's own, whatever `damping` says.

    Args:
        model: Model in evaluation mode, whose Fisher is estimated.
        learning_rate: Step length in natural gradients: a number, a function of the step such as
            `optax.cosine_decay_schedule` returns, or an array by `optax.inject_hyperparams`.  On a
            quadratic loss without noise 1 would be a whole step to the minimum.
        weight_decay: Multiple of the weights that is added to the direction, before the learning
            rate, as in AdamW; 0 by default.
        estimator: Another estimate of the inverse Fisher, such as `inverse.kfac(model)` for K-FAC;
            None for FishLeg.
        prune: Function of the estimator that returns a gradual pruning by it:
            `lambda shared: flj.fishleg_prune(model, schedule, estimator=shared)`.  None, the
            default, for training without pruning.
        rank: Number of eigenvectors of each axis of a kernel in FishLeg's Q, at most its size; 64
            by default, None for whole axes.  A product costs about `4·rank/(3·batch)` of a
            gradient.
        aux_every: Steps between batches that the estimate assimilates, once it is ready; 5 by
            default.
        damping: Damping γ in units of the Fisher per example: a positive number, a function of the
            step (counted from 1), an array by `optax.inject_hyperparams`, or None for the
            estimate's own, which suits pruning and is far too small at a random start.
            `"adaptive"`, the default, starts at a twentieth of the Fisher's trace, and follows the
            measured curvature of the loss along the steps.
        momentum: Share of the running mean of the gradients that a new gradient leaves, in [0, 1);
            0.9 by default.
        max_fisher_norm: Largest length of a whole step, with the learning rate and without weight
            decay, in the norm of the damped Fisher; 0.5 by default, None for no bound.  A step
            then changes the predictions by at most about half the square of it, in nats per
            example, which is what keeps a learning rate that is too high from doing harm.
        grafting: `sgd` or `adam` gives every leaf's direction the length that the step of that
            optimiser, with a learning rate of 1, would have; None, the default, keeps the lengths.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; None
            outside of these.  Gradients must be averaged over the devices already.
        seed: Seed of the estimate's random numbers, 0 by default.

    Returns:
        A transformation.  Its state is that of a chain; with `prune` a `SharedState`, in which
        `masks` and `check` find the pruning.

    Raises:
        ValueError: An argument out of its range, or a `prune` that returns no gradual pruning; from
            `init` and `update`, parameters that are missing, masked or not floating-point arrays; a
            missing batch.

    References:
        Garcia et al., Fisher-Legendre (FishLeg) optimization of deep neural networks, ICLR 2023;
        Loshchilov & Hutter, Decoupled weight decay regularization, ICLR 2019.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jax.random.normal(jax.random.key(0), (64, 8))
        >>> batch = inputs, inputs @ jnp.array([[3.0, 0, 0, 1, 0, 0, 0, 2]]).T
        >>> schedule = flj.schedules.cubic(0.5, begin=20, end=50)
        >>> prune = lambda shared: flj.fishleg_prune(
        ...     model, schedule, estimator=shared, mask_every=10, prunable=".*"
        ... )
        >>> tx = flj.fishleg_optimizer(model, 0.3, prune=prune)
        >>> params = jnp.ones((8, 1))
        >>> state = tx.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(lambda w: flj.loss(model, w, batch))(params)
        ...     updates, state = tx.update(grads, state, params, batch=batch)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(60):
        ...     params, state = step(params, state)
        >>> flj.sparsity(params, ".*"), bool(params[0] > 2.5), flj.check(state).ok
        (0.5, True, True)
    """
    check_model(model)
    _checks.check_rate(learning_rate, weight_decay)
    if estimator is None:
        estimator = streaming(model, rank, axis_name=axis_name)
    _checks.check_norm(max_fisher_norm)
    bound = max_fisher_norm
    if bound is not None:  # the bound on a whole step is one on the direction over the rate

        def bound(step):
            rate = learning_rate(step - 1) if callable(learning_rate) else learning_rate
            return max_fisher_norm / jnp.maximum(rate, TINY)

    chain = optax.chain(
        scale_by_inverse_fisher(
            estimator,
            aux_every=aux_every,
            damping=damping,
            momentum=momentum,
            max_fisher_norm=bound,
            grafting=grafting,
            axis_name=axis_name,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return chain if prune is None else shared(chain, estimator, prune)
