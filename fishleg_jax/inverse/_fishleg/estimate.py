"""FishLeg: the damped inverse Fisher, learned rather than inverted.

`Q(λ)` minimises the auxiliary loss `A(λ) = E_u[½ zᵀF_γ z − uᵀz]`, `z = Q(λ)u`, whose minimiser over
all Q is `F_γ⁻¹`.  Its gradient is that of `⟨F_γz − u, Q(λ)u⟩` with the first factor held fixed: one
Fisher product per step, not differentiated through.

Updates go through three phases.  Every update pulls one cotangent back through the network by a
vjp, and the phase only selects the cotangent:

1. first half of the start: the score of labels sampled from the model, which gives a Fisher sample;
   second moments of these samples along every axis determine the frames;
2. second half: the same, squared in the frames, which gives the eigenvalues of factors that learn
   them, while the other factors accumulate further moments;
3. learning: the Fisher in output space times the jvp of `z`, for the auxiliary gradient.

So the model is never differentiated inside a `lax.cond`, where XLA for the CPU runs the gradients
of convolutions many times slower (jax issue 12868).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _chunks, _labels, _tree, fisher
from fishleg_jax._checks import numbers
from fishleg_jax._devices import axis, sharding
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._fishleg import guard as _guard
from fishleg_jax.inverse._fishleg.learning import default_optimizer
from fishleg_jax.inverse._fishleg.learning import learn as learn_step
from fishleg_jax.inverse._fishleg.samples import draw_probe, pull
from fishleg_jax.inverse._fishleg.start import assimilate_samples, measured_leaves
from fishleg_jax.inverse._fishleg.state import FishLegState, Seen, multiply_leaves
from fishleg_jax.inverse._kronecker import algebra
from fishleg_jax.inverse._kronecker import frames as _frames
from fishleg_jax.inverse._kronecker.units import Unit, make_units
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model, split_batch

PROBES = ("normal", "sign", "gradient")


def fishleg(
    model: Model,
    damping: float | None = None,
    *,
    factors: _factors.Constructor | Mapping[str, _factors.Constructor] | None = None,
    join_bias: str | bool = False,
    stacked: _tree.Stacked = None,
    cap: int | None = 128,
    kind: str = "exact",
    probe: str = "normal",
    optimizer: optax.GradientTransformation | None = None,
    learn: bool = True,
    start: int = 256,
    samples: int = 4,
    examples_per_sample: int = 32,
    updates: int = 400,
    preconditioned: int = 0,
    window: int = 1000,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
) -> InverseFisher:
    """The FishLeg estimate: `Q(λ) ≈ (F + γI)⁻¹`, positive definite, learned batch by batch.

    Args:
        model: Model whose Fisher is inverted.
        damping: Damping γ in units of the Fisher per example (nats per squared weight).  None for
            half the root mean square of the Fisher's diagonal over leaves of two or more
            dimensions, measured during the start.
        factors: Structure of Q for each leaf: a constructor from `fishleg_jax.inverse.factors`, or
            a mapping of regular expressions over key paths to constructors, the first match
            deciding.  Other leaves use `factors.by_shape`.
        join_bias: Whether biases share the factor of their dense kernel: True for all, or a regular
            expression over the key paths of these kernels.
        stacked: Leaves with a leading axis of layers, as from `nn.scan` and `lax.scan`: regular
            expressions over key paths, or a predicate `(name, leaf)`.  Each layer gets its own
            factor, for the shape without that axis; a bias joined to a stacked kernel must be
            stacked as well.  None if no leaf is stacked.
        cap: Size of the largest dense block of a factor; longer axes are cut into blocks.  None for
            whole axes.  `factors.by_shape` gives dense kernels blocks of a half and a quarter of
            it.
        kind: Fisher to invert: `exact` (default), `sampled` or `empirical`.
        probe: Distribution of the probe u: `normal` for N(0, I), needed for pruning; `sign` for
            random signs, with the same covariance, the only statistic in the auxiliary loss, and
            about five times cheaper to draw; `gradient` for the batch's normalised gradient, as in
            optimisation.
        optimizer: Optimiser of the auxiliary loss; None for Adam with a decaying step.
        learn: Whether to learn after the closed-form start; if False, `updates` equals `start`.
        start: Number of updates of the start, limited to two thirds of `updates` if `learn`.
        samples: Maximum number of Fisher samples per batch of the start, one from each of equal
            parts (fewer if it does not divide the batch).  Each costs the memory of a gradient but
            hardly any time.
        examples_per_sample: Minimum number of examples in such a part.  Small parts slow down the
            products of dense networks with their weights; convolutional networks have many
            positions per example and profit: more samples mean less noise in the spectrum.
        updates: Number of updates of a one-shot fit in total, at least 3.
        preconditioned: Number of initial learning updates that use the preconditioned residual
            `Q(F_γz − u)`: faster on badly conditioned problems, but with another fixed point.
        window: Maximum number of updates in the running average of λ.
        examples_per_chunk: Number of examples processed at a time, which bounds the memory of
            activations; None for the whole batch.  The estimate changes by rounding only, which
            rotates eigenvectors of equal eigenvalues; sampled labels take one more forward pass.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; the state
            is replicated.  Cannot be combined with `examples_per_chunk`.  None outside of these.

    Returns:
        An `InverseFisher` whose state is a `FishLegState`.  Batches may differ in size and are
        weighted by their number of examples.

    Raises:
        ValueError: An argument out of range; from `init`, an expression that matches no leaf, or a
            stacked leaf of fewer than two dimensions.

    References:
        Garcia, Vernon, Zheng, Bernacchia, Hennequin: Fisher-Legendre (FishLeg) optimization of deep
        neural networks, ICLR 2023, equations 12 to 17.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> params, batch = jnp.ones((4, 2)), (jax.random.normal(jax.random.key(0), (50, 4)), None)
        >>> estimator = flj.inverse.fishleg(model, damping=0.1)
        >>> state = flj.fit(estimator, params, [batch], key=jax.random.key(1))
        >>> bool(state.relative_residual < 0.2)
        True
    """
    check_model(model)
    axis.check_name(axis_name)
    _chunks.check_chunk(examples_per_chunk, axis_name)
    learn = numbers.check_flag(learn, "learn")
    _check(damping, kind, probe, cap)
    _check_counts(
        start=(start, 2),
        samples=(samples, 1),
        examples_per_sample=(examples_per_sample, 1),
        updates=(updates, 3),
        preconditioned=(preconditioned, 0),
        window=(window, 1),
    )
    # the start samples labels, for the exact Fisher as well
    needs = {"exact": ("sample", "fisher"), "sampled": ("sample",)}.get(kind, ())
    _labels.require(model.likelihood, needs, f"kind={kind!r}")
    optimizer = default_optimizer() if optimizer is None else optimizer
    start = min(start, 2 * updates // 3) if learn else start

    def units_of(tree) -> tuple[Unit, ...]:
        return make_units(tree, factors, join_bias, cap, stacked)

    def init(params):
        dtype = _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(params)))
        units = units_of(params)
        zero, frames, moments = (
            {u.name: u.repeated(empty(u.factor, dtype)) for u in units}
            for empty in (_frames.zero_coordinates, _frames.empty_frame, _frames.zero_moments)
        )
        leaves, nothing = jax.tree.leaves(params), jnp.full((2,), jnp.nan, dtype)
        measured = measured_leaves(units, leaves) if damping is None else {}
        return FishLegState(
            count=jnp.zeros((), jnp.int32),
            seen=Seen(*jnp.zeros((3,), dtype)),
            damping=jnp.asarray(1.0 if damping is None else damping, dtype),
            squares={name: jnp.zeros(leaves[i].shape, dtype) for name, i in measured.items()},
            moments=moments,
            frames=frames,
            coordinates=zero,
            average=jax.tree.map(jnp.copy, zero),
            optimizer=optimizer.init(zero),
            guard=_guard.init(dtype),
            # two separate arrays: a state with aliased leaves cannot be donated
            auxiliary_loss=nothing[0],
            relative_residual=nothing[1],
        )

    def update(state, params, batch, key, mask=None):
        if split_batch(batch)[1] is None and (kind == "empirical" or probe == "gradient"):
            raise ValueError(
                f"batch: kind={kind!r} with probe={probe!r} needs labels, but its targets are None"
            )
        params = _tree.widen(params)
        units, tree = units_of(params), jax.tree.structure(params)
        probe_key, label_key = jax.random.split(key)
        starting = state.count < start

        def masked(leaves):
            return jax.tree.leaves(apply_mask(tree.unflatten(leaves), mask))

        # the probe u, and z = Q u with its vjp
        u = masked(
            draw_probe(probe, model, params, batch, probe_key, examples_per_chunk, axis_name)
        )
        z, pull_back = jax.vjp(
            lambda c: masked(multiply_leaves(units, state, c, u)), state.coordinates
        )
        pulled = [  # Fisher samples while starting, then Fisher products F z
            masked(x)
            for x in pull(
                model,
                params,
                batch,
                tree.unflatten(z),
                label_key,
                kind,
                starting,
                (samples, examples_per_sample),
                examples_per_chunk,
                axis_name,
            )
        ]

        # the closed-form start, then a learning step that does nothing while it lasts
        examples = _chunks.number_of_examples(batch)
        if axis_name is not None:
            examples *= jax.lax.axis_size(axis_name)
        assimilate = functools.partial(
            assimilate_samples,
            units,
            examples=examples,
            start=start,
            measure_damping=damping is None,
        )
        state = sharding.automatic(assimilate, state, state, pulled, mask)
        if not learn:
            return state
        product = [sum(parts) / len(parts) for parts in zip(*pulled, strict=True)]
        return learn_step(
            units,
            state,
            u,
            z,
            product,
            pull_back,
            optimizer,
            examples=examples,
            active=~starting,
            step=state.count - start,
            preconditioned=preconditioned,
            window=window,
        )

    def multiply(state, tangent, mask=None):
        tangent = apply_mask(_tree.widen(tangent), mask)
        leaves, tree = jax.tree.flatten(tangent)
        out = multiply_leaves(units_of(tangent), state, state.average, leaves)
        return apply_mask(tree.unflatten(out), mask)

    def diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out = list(leaves)
        for unit in units_of(params):
            of_layer = functools.partial(algebra.diagonal_of, unit.factor, damping=state.damping)
            args = state.frames[unit.name], state.average[unit.name]
            unit.unpack(unit.each(of_layer, *args), out)
        return apply_mask(tree.unflatten(out), mask)

    def fisher_diagonal(state, params, mask=None):  # as seen in the start, without λ
        leaves, tree = jax.tree.flatten(params)
        out = list(leaves)
        for unit in units_of(params):
            undamped = functools.partial(algebra.fisher_diagonal_of, unit.factor)
            unit.unpack(unit.each(undamped, state.frames[unit.name]), out)
        return apply_mask(tree.unflatten(out), mask)

    return spread(
        InverseFisher(
            init,
            update,
            multiply,
            diagonal,
            model=model,
            fisher_diagonal=fisher_diagonal,
            updates=updates if learn else start,
            ready=lambda state: state.count >= start,
            axis_name=axis_name,
        ),
        model_outside=True,
    )


def _check(damping, kind, probe, cap) -> None:
    if damping is not None:
        numbers.check_positive(damping, "damping", " or None")
    for name, value, allowed in (("kind", kind, fisher.KINDS), ("probe", probe, PROBES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if cap is not None:
        numbers.check_count(cap, "cap", or_none=" or None")


def _check_counts(**values: tuple[int, int]) -> None:
    """Raises a ValueError for an invalid count; each is given as `(value, minimum)`."""
    for name, (value, least) in values.items():
        numbers.check_count(value, name, least)
