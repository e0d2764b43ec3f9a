"""Scores of whole units, from the gradients of gates behind them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._batch import split_batch
from fishleg_jax._checks import arrays
from fishleg_jax._chunks import check_chunk
from fishleg_jax._jit import jitted
from fishleg_jax.compaction.analysis import Analysis
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.compaction.finding import coupled
from fishleg_jax.compaction.gates import Plan, gated, plan_of
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
    them, where `unit_scores` adds up leaves.  Of a weight with several uses, as in a tied
    embedding, only those count that read the unit.  One pass of per-example gradients with respect
    to the gates alone gives the scores of all units.

    Args:
        model: Model whose likelihood can sample, for `labels="sampled"`.
        params: Weights, any pytree.
        batches: Batches `(inputs, targets[, constants])` of training data.
        couplings: Axes that index the same units, as in `compact`; None finds them, and leaves out
            those whose units no weight reads, such as the size of a head in queries and keys.
        labels: `sampled`, the default, for labels drawn from the model (the Fisher); `empirical`
            for those of the batches.
        key: Random key of sampled labels; None for `jax.random.key(0)`.
        examples_per_chunk: Largest number of examples whose gradients are in memory at a time; None
            for a whole batch.

    Returns:
        `UnitScores`, in nats per example, for `choose_units`.

    Raises:
        ValueError: Invalid arguments, no batch, a given coupling whose units no weight reads
            directly, or units that are read inside of a function with a derivative of its own
            (`jax.custom_vjp`).

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
    found, plan = _read(analysis, found, couplings is not None)
    if not found:
        return UnitScores([], [])
    units = sum(members[0].units for members in found)
    gates = jnp.ones(units, jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
    key = jax.random.key(0) if key is None else key
    total, examples = np.zeros(units), 0
    compiled = jitted(_squares, model, plan, labels)
    for i, batch in enumerate(batches):
        size = jax.tree.leaves(batch[0])[0].shape[0]
        # A loop on the host, as XLA for the CPU is slow at convolutions inside its own.
        for begin in range(0, size, examples_per_chunk or size):
            end = min(begin + (examples_per_chunk or size), size)
            few = jax.tree.map(lambda x, begin=begin, end=end: x[begin:end], tuple(batch[:2]))
            drawn = jax.random.fold_in(jax.random.fold_in(key, i), begin)
            found_here = compiled(params, (*few, *batch[2:]), gates, drawn)
            total += np.asarray(found_here, np.float64)
        examples += size
    values = np.split(total / (2 * examples), np.cumsum([x[0].units for x in found])[:-1])
    short = [[member.short for member in members] for members in found]
    return UnitScores(short if couplings is None else couplings, values)


def _read(
    analysis: Analysis, couplings: list[tuple[Member, ...]], given: bool
) -> tuple[list[tuple[Member, ...]], Plan]:
    """Couplings whose units a weight reads, with their gates; a user's must all be such."""
    plan = plan_of(analysis, couplings)
    starts = np.cumsum([0, *(members[0].units for members in couplings)])
    read = {gate.start for gates in plan for gate in gates}
    chosen = [members for members, x in zip(couplings, starts, strict=False) if x in read]
    missing = [members for members, x in zip(couplings, starts, strict=False) if x not in read]
    if not missing:
        return couplings, plan
    if given:
        raise ValueError(
            f"couplings: no weight reads the units of {missing[0][0].short!r} directly, so their "
            "gates have no weights; leave the coupling out"
        )
    return chosen, plan_of(analysis, chosen)


def _squares(model, plan, labels, params, batch, gates, key):
    """Sums over examples of the squared derivatives of all gates."""
    few, constants = batch[:2], batch[2:]
    run = gated(model.predict, plan)
    # The weights are constants to this model, and the gates its parameters.
    behind = Model(lambda gates, x, rest: run(gates, rest[0], x, *rest[1]), model.likelihood)
    derivatives = per_example_gradients(
        behind,
        gates,
        (*few, (params, constants)),
        labels=labels,
        key=key if labels == "sampled" else None,
    )
    return jnp.sum(jnp.square(derivatives), axis=0)
