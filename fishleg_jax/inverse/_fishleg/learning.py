"""One step down the auxiliary loss of FishLeg, and the guard around it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax.inverse._fishleg import guard as _guard
from fishleg_jax.inverse._fishleg import progress as _progress
from fishleg_jax.inverse._fishleg.state import FishLegState, move, multiply_leaves
from fishleg_jax.inverse._kronecker import frames
from fishleg_jax.inverse._kronecker.units import Unit

SMOOTHING = 0.05  # weight of the newest sample in the smoothed loss and residual


def default_optimizer() -> optax.GradientTransformation:
    """Adam with a step decaying as an inverse square root, from 0.7 % of Q to a tenth of that.

    The coordinates are relative, so these numbers suit any model.
    """

    def step_size(count):
        return 7e-3 * jnp.maximum(jax.lax.rsqrt(1 + count / 50), 0.1)

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.99), optax.scale_by_learning_rate(step_size)
    )


def learn(
    units: tuple[Unit, ...],
    state: FishLegState,
    u: list[jax.Array],
    z: list[jax.Array],
    fisher_z: list[jax.Array],
    pull_back: Callable,
    optimizer: optax.GradientTransformation,
    *,
    examples: int,
    active: jax.Array,
    step: jax.Array,
    preconditioned: int,
    window: int,
) -> FishLegState:
    """Returns the state after one step of the auxiliary optimiser.

    A batch is weighted by its examples, relative to the mean batch so far: in the gradient, so that
    the optimiser settles where the gradient of all examples vanishes; in the running means; and, if
    it is smaller than average, as evidence of a divergence.

    Args:
        units: Leaves and their factors.
        state: State before the step.
        u: Probe, leaves of a flattened tree.
        z: Product `Q u` at the current coordinates.
        fisher_z: Product `F z`, undamped, not differentiated through.
        pull_back: Vjp of `coordinates -> Q u`.
        optimizer: Optimiser of the auxiliary loss.
        examples: Number of examples in the batch, over all devices.
        active: Boolean scalar, False during the start, which returns the state unchanged.
        step: Number of steps made before.
        preconditioned: Number of initial steps that use the residual `Q (F_γz − u)`.
        window: Maximum number of steps in the running average.
    """
    # the auxiliary loss, and the residual relative to the probe
    fgz = [f + state.damping * x for f, x in zip(fisher_z, z, strict=True)]
    residual = [f - x for f, x in zip(fgz, u, strict=True)]
    uz, zfz = _unit_dots(units, u, z), _unit_dots(units, z, fgz)
    total_uz, total_zfz = (sum(map(jnp.sum, dots.values())) for dots in (uz, zfz))
    loss = 0.5 * total_zfz - total_uz
    seen = state.seen + examples
    size = examples * (state.count + 1).astype(seen.dtype) / seen  # 1 for batches of equal size
    share = jnp.minimum(size, 1.0)
    relative = jnp.sqrt(_tree.dot(residual, residual) / _tree.dot(u, u))

    first = jnp.isnan(state.auxiliary_loss)
    finite = jnp.isfinite(loss) & jnp.isfinite(relative)
    # while Q is sane (at the minimum uᵀz = −2A), non-finite numbers come from the batch: skip it
    # without changing anything else
    calm = jnp.abs(total_uz) < 20 * jnp.abs(state.auxiliary_loss)
    batch_failed = active & ~_tree.all_finite(fisher_z) & (state.guard.at_average | calm)
    active = active & ~batch_failed
    # a small batch is noisier: fill it up to a mean batch with the smoothed loss
    filled = jnp.where(first, loss, state.auxiliary_loss + share * (loss - state.auxiliary_loss))
    diverged = _guard.has_diverged(jnp.where(share < 1, filled, loss)) & active
    trusted = active & ~diverged
    steps = (step + 1).astype(loss.dtype)
    smoothing = jnp.where(first, 1.0, jnp.minimum(size * jnp.maximum(1 / steps, SMOOTHING), 1.0))

    def smoothed(old, new):
        return jnp.where(trusted, jnp.where(first, new, old + smoothing * (new - old)), old)

    smooth_relative = smoothed(state.relative_residual, relative)

    # an iterate enters the average, which `multiply` uses, only once its loss was trusted
    weight = jnp.minimum(size * jnp.maximum(1 / (1 + 0.3 * steps), 1 / window), 1.0)
    average = move(state.average, state.coordinates, jnp.where(trusted, weight, 0.0))

    if preconditioned:
        warm = multiply_leaves(units, state, state.coordinates, residual)
        residual = optax.tree.where(step < preconditioned, warm, residual)
    (gradient,) = pull_back([size.astype(x.dtype) * x for x in residual])
    direction, optimizer_state = optimizer.update(gradient, state.optimizer, state.coordinates)
    # the residual drives the gradient's noise: when a few stiff directions leak into all others it
    # is far above one, and Adam's equalised steps would shake whole layers
    scale = state.guard.step_scale / jnp.maximum(smooth_relative, 1.0)
    moved = jax.tree.map(lambda c, d: c + scale * d, state.coordinates, direction)

    # after a divergence go back to the average; if the average itself diverged, rescale each unit
    rescaled = {
        u.name: u.each(
            partial(frames.rescale, u.factor),
            average[u.name],
            _guard.rescaling(uz[u.name], uz[u.name] + share * (zfz[u.name] - uz[u.name])),
        )
        for u in units
    }
    average = optax.tree.where(diverged & state.guard.at_average & finite, rescaled, average)
    back = optax.tree.where(active, average, state.coordinates)
    fresh = optax.tree.where(active, optimizer.init(state.coordinates), state.optimizer)
    return state._replace(
        count=state.count + active,
        seen=jnp.where(active, seen, state.seen),
        coordinates=optax.tree.where(trusted, moved, back),
        average=average,
        optimizer=optax.tree.where(trusted, optimizer_state, fresh),
        guard=optax.tree.where(
            active,
            _guard.advance(state.guard, diverged, finite),
            state.guard._replace(skipped=state.guard.skipped + batch_failed),
        ),
        progress=_progress.noted(state.progress, loss, trusted),
        auxiliary_loss=smoothed(state.auxiliary_loss, loss),
        relative_residual=smooth_relative,
    )


def _unit_dots(units: tuple[Unit, ...], x: list, y: list) -> dict[str, jax.Array]:
    """Inner products of two flattened trees, per unit; per layer for stacks."""

    def dot(unit, i):
        product = x[i] * y[i]
        return jnp.sum(product, axis=None if unit.stack is None else range(1, product.ndim))

    return {u.name: sum(dot(u, i) for i in u.leaves) for u in units}
