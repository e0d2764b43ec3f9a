"""Closed form of FishLeg: frames, spectrum and damping from Fisher samples."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax._devices import axis
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._fishleg.state import FishLegState, move
from fishleg_jax.inverse._kronecker import frames as _frames
from fishleg_jax.inverse._kronecker import low_rank as _low_rank
from fishleg_jax.inverse._kronecker.units import Unit

RELATIVE_DAMPING = 0.1  # default damping, relative to the typical entry of the Fisher's diagonal
REFRESHES = 4  # of the frames in each window of batches, once that is full


def assimilate_samples(
    units: tuple[Unit, ...],
    state: FishLegState,
    samples: list[jax.Array],
    mask: Any | None,
    *,
    examples: int,
    active: jax.Array | bool,
    window: int,
    measure_damping: bool,
    axis_name: str | None,
) -> FishLegState:
    """Assimilates a batch's Fisher samples into the state.

    Second moments of the samples along every axis go into running averages, and so do the squares
    of the same samples in the frames, which are the eigenvalues of factors that learn them.  Frames
    are made of the moments at the first batch, whenever the number of batches has doubled, and four
    times in a window once that is full; the eigenvalues move along.  Moments along an axis are sums
    over all other axes, so that squares of the samples behind the frames are hardly biased.  The
    eigenvalues of other factors are part of their frames, which are made anew with every batch.

    Averages weight a batch by its examples, and by at least 1/window of a mean batch.  A batch with
    a sample that is not finite is only counted as skipped.

    Args:
        units: Leaves and their factors.
        state: State before the batch.
        samples: Fisher samples, the leaves of a flattened tree with a leading axis of samples whose
            covariance is the Fisher.
        mask: Boolean pytree, True for surviving weights; None for all.
        examples: Number of examples in the batch, over all devices.
        active: Whether to assimilate the batch; if False, the state is returned unchanged.
        window: Number of batches in the running averages.
        measure_damping: Whether the damping follows the Fisher.
        axis_name: Axis of devices, each with its own samples; None if they all have the same.
    """
    # whether the samples can be used, and the weight of the batch
    finite = axis.everywhere(_tree.all_finite(samples), axis_name)
    usable = finite & active
    seen = state.seen + examples
    size = examples * (state.count + 1).astype(seen.dtype) / seen  # 1 for batches of equal size
    share = jnp.maximum(examples / seen, jnp.minimum(size / window, 1.0))
    count = state.count + 1
    due = (count >= 2 * state.framed) | (count - state.framed >= max(window // REFRESHES, 1))

    weight = jnp.where(usable, share, 0.0)

    def rows_of(unit):
        rows = jax.vmap(unit.pack)(samples)
        return rows if unit.stack is None else rows.swapaxes(0, 1)  # layers first

    spectral = [u for u in units if u.factor.spectrum]
    turning = [u for u in spectral if u.factor.dense_axes]
    others = [u for u in units if not u.factor.spectrum]
    iterating = [u for u in units if u.factor.rank is not None]

    def averaged(unit, old, function, *arguments):
        new = unit.each(partial(function, unit.factor), *arguments, rows_of(unit))
        return move(old, axis.mean(new, axis_name), weight)

    def assimilate(carry):
        moments, frames = carry
        before, moments = moments, {}
        for u in units:
            if u in iterating:
                of = _low_rank.mean_moments, frames[u.name]
            else:
                of = (_frames.mean_moments,)
            moments[u.name] = averaged(u, before[u.name], *of)

        def turned(chosen, turn=_frames.turn):
            return {
                u.name: u.one_by_one(partial(turn, u.factor), frames[u.name], moments[u.name])
                for u in chosen
            }

        # frames of the moments, and then their spectrum, which moves along, of the same samples
        old = {u.name: frames[u.name] for u in turning}
        new = run_if(due & usable, lambda _: turned(turning), old) | turned(others)
        if iterating:
            old = {u.name: (frames[u.name], moments[u.name]) for u in iterating}
            pairs = run_if(due & usable, lambda _: turned(iterating, _low_rank.turn), old)
            new |= {name: frame for name, (frame, _) in pairs.items()}
            moments |= {name: iterated for name, (_, iterated) in pairs.items()}
        frames = frames | new
        for u in spectral:
            frame = frames[u.name]
            spectrum = averaged(u, frame.spectrum, _frames.mean_spectrum, frame)
            frames[u.name] = frame._replace(spectrum=spectrum)
        return moments, frames

    before = state.moments, state.frames
    always = active is True
    moments, frames = assimilate(before) if always else run_if(active, assimilate, before)
    # the damping, from the trace of the Fisher of every leaf
    damping, measured = state.damping, state.measured
    if measure_damping:
        now = measure(units, frames, moments, samples, mask).astype(measured.dtype)
        now = jnp.where(usable, now, measured)
        damping, measured = damping * (now / measured), now
    # count the batch, as assimilated or as skipped
    guard = state.guard._replace(skipped=state.guard.skipped + (~finite & active))
    return state._replace(
        count=state.count + usable,
        seen=jnp.where(usable, seen, state.seen),
        framed=jnp.where(usable & due, count, state.framed),
        damping=damping,
        measured=measured,
        moments=moments,
        frames=frames,
        guard=guard,
    )


def measured_leaves(units: tuple[Unit, ...], leaves: list[jax.Array]) -> list[Unit]:
    """Units on which the damping is measured.

    Only matrices and tensors count, if there are any: they are pruned, and vectors (biases,
    normalisation scales) have far larger Fishers.
    """
    filled = [u for u in units if 0 not in jnp.shape(leaves[u.leaves[0]])]
    layers = {u.name: jnp.ndim(leaves[u.leaves[0]]) - (u.stack is not None) for u in filled}
    return [u for u in filled if layers[u.name] > 1] or filled


def measure(
    units: tuple[Unit, ...],
    frames: dict[str, _factors.Frame],
    moments: dict[str, tuple[jax.Array, ...]],
    samples: list[jax.Array],
    mask: Any | None,
) -> jax.Array:
    """Default damping: `RELATIVE_DAMPING` times a typical entry of the Fisher's diagonal.

    That is the geometric mean over surviving weights of their leaf's (or layer's) mean diagonal,
    which is a trace.  So neither the noise of the samples nor a few leaves or weights with a far
    larger Fisher than the others lift it.

    Args:
        units: Leaves and their factors.
        frames: Frames with their spectra.
        moments: Second moments of the samples.
        samples: Fisher samples of a batch, for the shapes.
        mask: Boolean pytree, True for surviving weights; None for all.
    """
    shapes = [x[0] for x in samples]
    masks = [jnp.ones(x.shape, bool) for x in shapes] if mask is None else jax.tree.leaves(mask)
    logs, weights = [], []
    for unit in measured_leaves(units, shapes):
        kept = unit.pack(masks)
        number = kept.reshape(unit.stack or 1, -1).sum(1)
        if unit.factor.rank is not None:
            trace = unit.each(partial(_low_rank.trace, unit.factor), frames[unit.name])
            trace = trace.reshape(-1)
        elif unit.factor.spectrum:
            trace = frames[unit.name].spectrum.reshape(unit.stack or 1, -1).sum(1)
        else:  # all axes have the same trace
            first = moments[unit.name][0]
            trace = jnp.trace(first, axis1=-2, axis2=-1).reshape(unit.stack or 1, -1).sum(1)
        some = (trace > 0) & (number > 0)
        logs.append(jnp.log(jnp.where(some, trace / jnp.maximum(number, 1), 1.0)))
        weights.append(jnp.where(some, number, 0))
    logs, weights = jnp.concatenate(logs), jnp.concatenate(weights)
    mean = jnp.sum(logs * weights) / jnp.maximum(jnp.sum(weights), 1)
    typical = jnp.where(jnp.any(weights > 0), jnp.exp(mean), 0.0)
    # bounded below: for a model without gradients the damping would be zero, and divided by
    return jnp.maximum(RELATIVE_DAMPING * typical, jnp.finfo(typical.dtype).eps ** 2)
