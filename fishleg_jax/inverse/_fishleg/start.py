"""Closed-form start of FishLeg: frames and damping from Fisher samples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._branch import run_if
from fishleg_jax.inverse._fishleg.state import FishLegState, Seen, move
from fishleg_jax.inverse._kronecker import frames as _frames
from fishleg_jax.inverse._kronecker.units import Unit

RELATIVE_DAMPING = 0.5  # default damping, relative to the RMS of the Fisher's diagonal


def assimilate_samples(
    units: tuple[Unit, ...],
    state: FishLegState,
    samples: list[list[jax.Array]],
    mask: Any | None,
    *,
    examples: int,
    start: int,
    measure_damping: bool,
) -> FishLegState:
    """Assimilates a batch's Fisher samples into the state; after the start, returns it unchanged.

    For factors with a learned spectrum the first half of the batches is averaged into second
    moments along every axis, and the last of these batches turns them into frames; the second half
    gives the eigenvalues in the frames.  Other factors take their moments from all batches.  Means
    weight a batch by its examples; the start is halved by batches, because the number of examples
    to come is unknown.  A batch with a sample that is not finite is only counted as skipped.

    Args:
        units: Leaves and their factors.
        state: State before the batch.
        samples: Fisher samples of one batch, each the leaves of a flattened tree whose covariance
            is the Fisher.
        mask: Boolean pytree, True for surviving weights; None for all.
        examples: Number of examples in the batch, over all devices.
        start: Number of batches of the start, at least 2.
        measure_damping: Whether the damping follows the RMS of the diagonal of the Fisher.
    """
    # the phase, and whether the samples can be used
    for_frames = max(start // 2, 1)
    starting = state.count < start
    # everything that reads the samples is conditional: after the start it would be wasted
    finite = jax.lax.cond(starting, _tree.all_finite, lambda samples: jnp.array(True), samples)
    usable = starting & finite
    first_phase = state.count < for_frames
    dtype = state.damping.dtype
    half = jnp.where(state.count == for_frames, 0, state.seen.half)

    def pack(unit, samples):
        return jnp.stack([unit.pack(sample) for sample in samples])

    def share(seen):
        return examples / (seen + examples)

    def average_moments(units, moments):
        new = {
            u.name: _mean(partial(u.each, partial(_frames.moments_of, u.factor)), pack(u, samples))
            for u in units
        }
        return move(moments, new, share(state.seen.examples))

    def average_spectrum(units, frames):
        out = {}
        for u in units:
            frame = frames[u.name]
            of_layer = partial(_frames.spectrum_of, u.factor)
            squares = _mean(partial(u.each, of_layer, frame), pack(u, samples))
            spectrum = move(frame.spectrum, squares, share(half))
            out[u.name] = frame._replace(spectrum=spectrum)
        return out

    def advance(units, batches):
        """Averages moments over `batches` batches; the last one turns them into frames."""
        names = [u.name for u in units]
        due = usable & (state.count < batches)
        old = {name: state.moments[name] for name in names}
        moments = run_if(due, partial(average_moments, units), old)

        def decompose(frames):
            return {
                u.name: u.one_by_one(
                    partial(_frames.decompose, u.factor), frames[u.name], moments[u.name]
                )
                for u in units
            }

        old = {name: state.frames[name] for name in names}
        return moments, run_if(usable & (state.count == batches - 1), decompose, old)

    # factors with a spectrum: moments and frames, then eigenvalues; the others: moments throughout
    spectral = [u for u in units if u.factor.spectrum]
    moments, frames = advance(spectral, for_frames)
    frames = run_if(usable & ~first_phase, partial(average_spectrum, spectral), frames)
    others = advance([u for u in units if not u.factor.spectrum], start)
    moments, frames = moments | others[0], frames | others[1]

    # the damping, from the diagonal of the Fisher
    squares, pairs, damping = state.squares, state.seen.pairs, state.damping
    if measure_damping:
        measure = partial(_measure, units, samples, mask, state.seen.examples, examples)
        squares, pairs, damping = run_if(usable, measure, (squares, pairs, damping))
    # count the batch, as assimilated or as skipped
    more = jnp.where(usable, jnp.asarray(examples, dtype), 0)
    guard = state.guard._replace(skipped=state.guard.skipped + (starting & ~finite))
    return state._replace(
        count=state.count + usable,
        seen=Seen(state.seen.examples + more, half + more, pairs),
        damping=damping,
        squares=squares,
        moments=moments,
        frames=frames,
        guard=guard,
    )


def _mean(function: Callable[[jax.Array], Any], stack: jax.Array) -> Any:
    """Mean of a function (an array or a pytree) over the leading axis of its argument."""
    return jax.tree.map(lambda x: x.mean(0), jax.vmap(function)(stack))


def measured_leaves(units: tuple[Unit, ...], leaves: list[jax.Array]) -> dict[str, int]:
    """Names and positions of the leaves on which the damping is measured.

    Only matrices and tensors count, if there are any: they are pruned, and vectors (biases,
    normalisation scales) have far larger Fishers.
    """
    filled = [u for u in units if 0 not in jnp.shape(leaves[u.leaves[0]])]
    layers = {u.name: jnp.ndim(leaves[u.leaves[0]]) - (u.stack is not None) for u in filled}
    matrices = [u for u in filled if layers[u.name] > 1]
    return {u.name: u.leaves[0] for u in matrices or filled}


def _measure(
    units: tuple[Unit, ...],
    samples: list[list[jax.Array]],
    mask: Any | None,
    seen: jax.Array,
    examples: int,
    carry: tuple,
) -> tuple:
    """Updates the mean squares, the weight of pairs and the damping with a batch's samples.

    The damping follows the mean of `F_ii²` over surviving weights, F the Fisher of all examples.
    Let v_k be the squares of sample k, of e_k examples and with the Fisher F_k; `E[v_k] = diag F_k`
    and, since labels are drawn independently, `E[v_k ⊙ v_l] = diag F_k ⊙ diag F_l` for k ≠ l.  So

        Σ_{k≠l} e_k e_l ⟨v_k, v_l⟩ / Σ_{k≠l} e_k e_l

    has no bias from the noise of the samples for any distribution, and its expectation is
    `‖Σ e_k diag F_k‖² / (Σ e_k)²` except for the pairs of a sample with itself, a fraction of one
    over the number of samples.  The fourth moment, `E[M⁴] = 3 E[M²]²`, would need normal samples,
    thus sums over many examples, and equal Fishers F_k.  Pairs are added as they come, each sample
    with the mean of those before it, so that a squared mean needs no correction.

    Args:
        units: Leaves and their factors.
        samples: Fisher samples of equal parts of the batch.
        mask: Boolean pytree, True for surviving weights; None for all.
        seen: Number of examples before the batch.
        examples: Number of examples in the batch.
        carry: Mean squares, sum of the weights of pairs, and damping.
    """
    squares, pairs, damping = carry
    chosen = measured_leaves(units, samples[0])
    survivors = [jnp.ones_like(x) for x in samples[0]] if mask is None else jax.tree.leaves(mask)
    count = jnp.maximum(sum(jnp.sum(survivors[i]) for i in chosen.values()), 1)
    part = examples / len(samples)
    mean_square = (damping / RELATIVE_DAMPING) ** 2
    for sample in samples:
        new = {name: sample[i].astype(squares[name].dtype) ** 2 for name, i in chosen.items()}
        pairs = pairs + part * seen
        # the very first sample has no partner: use the fourth moment of a normal distribution
        alone = pairs == 0
        product = jnp.where(alone, _tree.dot(new, new) / 3, _tree.dot(new, squares)) / count
        weight = jnp.where(alone, 1.0, part * seen / jnp.where(alone, 1.0, pairs))
        mean_square = (1 - weight) * mean_square + weight * product.astype(damping.dtype)
        squares = move(squares, new, part / (seen + part))
        seen = seen + part
    damping = RELATIVE_DAMPING * jnp.sqrt(mean_square)
    # bounded below: for a model without gradients the damping would be zero, and divided by
    return squares, pairs, jnp.maximum(damping, jnp.finfo(damping.dtype).eps ** 2)
