"""The start of FishLeg in closed form: frames and damping from Fisher samples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax.inverse import _frames
from fishleg_jax.inverse._state import FishLegState, move
from fishleg_jax.inverse._units import Unit

RELATIVE_DAMPING = 0.5  # times the RMS diagonal of the Fisher, where the user names no damping


def assimilate_samples(
    units: tuple[Unit, ...],
    state: FishLegState,
    samples: list[list[jax.Array]],
    mask: Any | None,
    *,
    start: int,
    measure_damping: bool,
) -> FishLegState:
    """The state with a batch's Fisher samples in it; after the start it is handed back as it came.

    Where a factor learns its spectrum the first half of the batches is averaged into second moments
    along every axis, and the last of it turns these into frames; the others give the eigenvalues in
    the frames.  Factors without one take their moments from all batches.  A batch of which a sample
    is not finite leaves no trace but a count.

    Args:
        units: the leaves and their factors.
        state: the state before.
        samples: of one batch, each the leaves of a flattened tree whose covariance is the Fisher.
        mask: which weights survive, or None.
        start: how many batches there are in all, two or more.
        measure_damping: whether the damping follows the RMS of the diagonal of the Fisher.
    """
    for_frames = max(start // 2, 1)
    starting = state.count < start
    # all that reads the samples stands in a conditional: it is for nothing after the start
    finite = jax.lax.cond(starting, _tree.all_finite, lambda samples: jnp.array(True), samples)
    usable = starting & finite
    first_phase = state.count < for_frames

    def pack(unit, samples):
        return jnp.stack([unit.pack(sample) for sample in samples])

    def share(seen):
        return 1 / (seen + 1).astype(state.damping.dtype)

    def average_moments(units, moments):
        new = {
            u.name: _mean(partial(_frames.moments_of, u.factor), pack(u, samples)) for u in units
        }
        return move(moments, new, share(state.count))

    def average_spectrum(units, frames):
        out = {}
        for u in units:
            frame = frames[u.name]
            squares = _mean(partial(_frames.spectrum_of, u.factor, frame), pack(u, samples))
            spectrum = move(frame.spectrum, squares, share(state.count - for_frames))
            out[u.name] = frame._replace(spectrum=spectrum)
        return out

    def advance(units, batches):
        """Moments of so many batches, and the frames that the last of them turns these into."""
        names = [u.name for u in units]
        due = usable & (state.count < batches)
        old = {name: state.moments[name] for name in names}
        moments = run_if(due, partial(average_moments, units), old)

        def decompose(frames):
            return {
                u.name: _frames.decompose(u.factor, frames[u.name], moments[u.name]) for u in units
            }

        old = {name: state.frames[name] for name in names}
        return moments, run_if(usable & (state.count == batches - 1), decompose, old)

    spectral = [u for u in units if u.factor.spectrum]
    moments, frames = advance(spectral, for_frames)
    frames = run_if(usable & ~first_phase, partial(average_spectrum, spectral), frames)
    others = advance([u for u in units if not u.factor.spectrum], start)
    moments, frames = moments | others[0], frames | others[1]

    damping = state.damping
    if measure_damping:
        # the mean square is what is averaged over samples
        measured = jax.lax.cond(
            usable,
            lambda samples: jnp.mean(
                jnp.stack([_mean_square_diagonal(x, mask) for x in samples]), dtype=damping.dtype
            ),
            lambda samples: jnp.zeros((), damping.dtype),
            samples,
        )
        weight = jnp.where(usable, share(state.count), 0.0)
        damping = jnp.sqrt(move(damping**2, RELATIVE_DAMPING**2 * measured, weight))
        # a model without any gradient would have none, and nothing to divide by
        damping = jnp.maximum(damping, jnp.finfo(damping.dtype).eps ** 2)
    guard = state.guard._replace(skipped=state.guard.skipped + (starting & ~finite))
    return state._replace(
        count=state.count + usable, damping=damping, moments=moments, frames=frames, guard=guard
    )


def _mean(function: Callable[[jax.Array], Any], stack: jax.Array) -> Any:
    """The mean of a function, an array or a tree of them, over the leading axis of its argument."""
    return jax.tree.map(lambda x: x.mean(0), jax.vmap(function)(stack))


def _mean_square_diagonal(sample: list[jax.Array], mask: Any | None) -> jax.Array:
    """The mean square of the Fisher's diagonal over surviving weights, from one Fisher sample.

    A sample M of a batch is a sum over its examples, nearly normal, so that `E[M⁴] = 3 E[M²]²`.
    Matrices and tensors alone are counted where there are any: they are what is pruned, and vectors
    (biases, normalisation scales) have Fishers far above theirs.
    """
    survivors = [jnp.ones_like(x) for x in sample] if mask is None else jax.tree.leaves(mask)
    wanted = [i for i, x in enumerate(sample) if x.ndim > 1] or range(len(sample))
    total = sum(jnp.sum(sample[i] ** 4) for i in wanted)
    count = sum(jnp.sum(survivors[i]) for i in wanted)
    return total / (3 * jnp.maximum(count, 1))
