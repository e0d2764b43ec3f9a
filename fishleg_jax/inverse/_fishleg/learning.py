"""One step down the auxiliary loss of FishLeg, and the guard around it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax.inverse._fishleg import guard as _guard
from fishleg_jax.inverse._fishleg.state import FishLegState, move, multiply_leaves
from fishleg_jax.inverse._kronecker import frames
from fishleg_jax.inverse._kronecker.units import Unit

SMOOTHING = 0.05  # the weight of the newest sample in the smoothed loss and residual


def default_optimizer() -> optax.GradientTransformation:
    """Adam with a step that falls like one over a square root, from 0.7 % of Q to a tenth of that.

    The coordinates are relative, so that these numbers fit every model.
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
    """The state after one step of the auxiliary optimiser.

    A batch counts by its examples, relative to the mean batch so far: in the gradient, so that the
    optimiser comes to rest where the gradient of all examples vanishes; in the running means; and,
    where it is smaller than most, as evidence of a divergence.

    Args:
        units: the leaves and their factors.
        state: the state before.
        u: the probe, leaves of a flattened tree.
        z: `Q u` at the current coordinates.
        fisher_z: `F z`, undamped, off the tape.
        pull_back: the vjp of `coordinates -> Q u`.
        optimizer: of the auxiliary loss.
        examples: number of examples in the batch, over all devices.
        active: False while the start goes on: the state is handed back as it came.
        step: how many steps were made before.
        preconditioned: how many steps use the residual `Q (F_γz − u)`.
        window: how many steps the running average reaches back at most.
    """
    fgz = [f + state.damping * x for f, x in zip(fisher_z, z, strict=True)]
    residual = [f - x for f, x in zip(fgz, u, strict=True)]
    uz, zfz = _unit_dots(units, u, z), _unit_dots(units, z, fgz)
    total_uz, total_zfz = (sum(map(jnp.sum, dots.values())) for dots in (uz, zfz))
    loss = 0.5 * total_zfz - total_uz
    seen = state.seen.examples + examples
    size = examples * (state.count + 1).astype(seen.dtype) / seen  # one where all are equal
    share = jnp.minimum(size, 1.0)
    relative = jnp.sqrt(_tree.dot(residual, residual) / _tree.dot(u, u))

    first = jnp.isnan(state.auxiliary_loss)
    finite = jnp.isfinite(loss) & jnp.isfinite(relative)
    # where Q is as it was (at the minimum uᵀz = −2A), what is not finite is the batch's doing, and
    # it shall be as if the batch had not been
    calm = jnp.abs(total_uz) < 20 * jnp.abs(state.auxiliary_loss)
    batch_failed = active & ~_tree.all_finite(fisher_z) & (state.guard.at_average | calm)
    active = active & ~batch_failed
    # a batch of few examples scatters more: the rest of a mean batch is taken to be as before
    filled = jnp.where(first, loss, state.auxiliary_loss + share * (loss - state.auxiliary_loss))
    diverged = _guard.has_diverged(jnp.where(share < 1, filled, loss)) & active
    trusted = active & ~diverged
    steps = (step + 1).astype(loss.dtype)
    smoothing = jnp.where(first, 1.0, jnp.minimum(size * jnp.maximum(1 / steps, SMOOTHING), 1.0))

    def smoothed(old, new):
        return jnp.where(trusted, jnp.where(first, new, old + smoothing * (new - old)), old)

    smooth_relative = smoothed(state.relative_residual, relative)

    # an iterate enters the average, which is what users see, only after it was found sound
    weight = jnp.minimum(size * jnp.maximum(1 / (1 + 0.3 * steps), 1 / window), 1.0)
    average = move(state.average, state.coordinates, jnp.where(trusted, weight, 0.0))

    if preconditioned:
        warm = multiply_leaves(units, state, state.coordinates, residual)
        residual = _tree.keep_where(step < preconditioned, warm, residual)
    (gradient,) = pull_back([size.astype(x.dtype) * x for x in residual])
    direction, optimizer_state = optimizer.update(gradient, state.optimizer, state.coordinates)
    # the residual is what the gradient's noise is made of: where a few stiff directions leak into
    # everything it is far above one, and steps that Adam made equal would shake whole layers
    scale = state.guard.step_scale / jnp.maximum(smooth_relative, 1.0)
    moved = jax.tree.map(lambda c, d: c + scale * d, state.coordinates, direction)

    # back to the average; but where that is itself what was measured, rescale it, unit by unit
    rescaled = {
        u.name: u.each(
            partial(frames.rescale, u.factor),
            average[u.name],
            _guard.rescaling(uz[u.name], uz[u.name] + share * (zfz[u.name] - uz[u.name])),
        )
        for u in units
    }
    average = _tree.keep_where(diverged & state.guard.at_average & finite, rescaled, average)
    back = _tree.keep_where(active, average, state.coordinates)
    fresh = _tree.keep_where(active, optimizer.init(state.coordinates), state.optimizer)
    return state._replace(
        count=state.count + active,
        seen=state.seen._replace(examples=jnp.where(active, seen, state.seen.examples)),
        coordinates=_tree.keep_where(trusted, moved, back),
        average=average,
        optimizer=_tree.keep_where(trusted, optimizer_state, fresh),
        guard=_tree.keep_where(
            active,
            _guard.advance(state.guard, diverged, finite),
            state.guard._replace(skipped=state.guard.skipped + batch_failed),
        ),
        auxiliary_loss=smoothed(state.auxiliary_loss, loss),
        relative_residual=smooth_relative,
    )


def _unit_dots(units: tuple[Unit, ...], x: list, y: list) -> dict[str, jax.Array]:
    """The inner product of two flattened trees, unit by unit; of stacks, layer by layer."""

    def dot(unit, i):
        product = x[i] * y[i]
        return jnp.sum(product, axis=None if unit.stack is None else range(1, product.ndim))

    return {u.name: sum(dot(u, i) for i in u.leaves) for u in units}
