"""Scores of whole units, from the gradients of gates behind them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._batch import split_batch
from fishleg_jax._checks import arrays
from fishleg_jax._chunks import check_chunk
from fishleg_jax._jit import jitted
from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction.analysis import Analysis
from fishleg_jax.compaction.compact import coupled
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.compaction.unit_scores import UnitScores
from fishleg_jax.model import Model, check_model
from fishleg_jax.per_example import per_example_gradients


def gate_scores(
    model: Model,
    params: Any,
    batches: Sequence[Any],
    *,
    couplings: list[list[tuple]] | None = None,
    labels: str = "sampled",
    key: jax.Array | None = None,
    examples_per_chunk: int | None = None,
) -> UnitScores:
    """Predicted rise of the loss when single units go and nothing moves, exact in the Fisher.

    A gate of 1 behind each unit multiplies what all layers read from it.  Closing it changes the
    loss by `½ E[(∂l/∂gate)²]`, the gate's entry of the Fisher; that is `½ w_Bᵀ F_BB w_B` over all
    weights B that read the unit, in however many leaves they lie and with all correlations among
    them, where `unit_scores` adds up leaves.  The gate's derivative is `Σ_B w_i ∂l/∂w_i`, so one
    pass of per-example gradients gives the scores of all units.

    Args:
        model: Model whose likelihood can sample, for `labels="sampled"`.
        params: Weights, any pytree.
        batches: Batches `(inputs, targets[, constants])` of training data.
        couplings: Axes that index the same units, as in `compact`; None finds them.
        labels: `sampled`, the default, for labels drawn from the model (the Fisher); `empirical`
            for those of the batches.
        key: Random key of sampled labels; None for `jax.random.key(0)`.
        examples_per_chunk: Largest number of examples whose gradients are in memory at a time; None
            for a whole batch.

    Returns:
        `UnitScores`, in nats per example, for `choose_units`.

    Raises:
        ValueError: Invalid arguments, no batch, or a unit that no weight reads directly.

    References:
        Theis, Korshunova, Tejani & Huszár, Faster gaze prediction with dense networks and Fisher
        pruning, 2018, equation 7; Liu et al., Group Fisher pruning for practical network
        compression, ICML 2021, for coupled channels.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"w1": jnp.eye(2), "w2": jnp.array([[1.0], [3.0]])}
        >>> model = flj.Model(
        ...     lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], flj.likelihoods.gaussian())
        >>> batch = jnp.eye(2), jnp.zeros((2, 1))
        >>> scores = flj.gate_scores(model, params, [batch], labels="empirical")
        >>> scores.values[0].round(2).tolist()  # 1/4 h⁴ w⁴ with h = tanh(1)
        [0.08, 6.81]
    """
    check_model(model)
    arrays.check_params(params)
    check_chunk(examples_per_chunk)
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    inputs, _, given_constants = split_batch(batches[0])
    constants = given_constants[0] if given_constants else None
    _, analysis, found = coupled(model, params, inputs, constants, couplings)
    readers = _readers(analysis, found, params)
    units = sum(members[0].units for members in found)
    key = jax.random.key(0) if key is None else key
    total, examples = np.zeros(units), 0
    compiled = jitted(_squares, model, labels, units)
    for i, batch in enumerate(batches):
        size = jax.tree.leaves(batch[0])[0].shape[0]
        # A loop on the host, as XLA for the CPU is slow at convolutions inside its own.
        for begin in range(0, size, examples_per_chunk or size):
            end = min(begin + (examples_per_chunk or size), size)
            few = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], tuple(batch[:2]))
            drawn = jax.random.fold_in(jax.random.fold_in(key, i), begin)
            found_here = compiled(params, (*few, *batch[2:]), readers, drawn)
            total += np.asarray(found_here, np.float64)
        examples += size
    values = np.split(total / (2 * examples), np.cumsum([x[0].units for x in found])[:-1])
    short = [[member.short for member in members] for members in found]
    return UnitScores(short if couplings is None else couplings, values)


def _readers(analysis: Analysis, couplings: Sequence[tuple[Member, ...]], params: Any) -> Any:
    """The unit that each weight reads, numbered through all couplings; −1 for none."""
    sizes = [np.size(leaf) for _, leaf in _tree.named_leaves(params)]
    unit_of, start = np.full(sum(sizes), -1, np.int32), 0
    for members in couplings:
        factor, read = analysis.factor_of(members[0]), 0
        for meeting in analysis.meetings:
            sides = meeting.sides()
            if factor not in meeting.factors or sides is None or sides[1][0].elements is None:
                continue
            weights, along = sides[1]
            for elements in _axes.by_unit(weights.elements, weights.axes, factor, along):
                here = elements < unit_of.size
                numbers = np.broadcast_to(start + np.arange(factor.size)[:, None], elements.shape)
                unit_of[elements[here]] = numbers[here]
                read += int(here.sum())
        if not read:
            raise ValueError(
                f"couplings: no weight reads the units of {members[0].short!r} directly, so their "
                "gates have no weights; leave the coupling out"
            )
        start += members[0].units
    parts = np.split(unit_of, np.cumsum(sizes)[:-1])
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(
        part.reshape(jnp.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)
    )


def _squares(model, labels, units, params, batch, readers, key):
    """Sums over examples of the squared derivatives of all gates."""
    gradients = per_example_gradients(
        model, params, batch, labels=labels, key=key if labels == "sampled" else None
    )

    def derivative(gradient):
        parts = jax.tree.map(
            lambda g, w, unit: jax.ops.segment_sum(
                (g * w).ravel().astype(jnp.float32), unit.ravel() + 1, units + 1
            ),
            gradient,
            params,
            readers,
        )
        return sum(jax.tree.leaves(parts))[1:]

    return jnp.sum(jnp.square(jax.vmap(derivative)(gradients)), axis=0)
