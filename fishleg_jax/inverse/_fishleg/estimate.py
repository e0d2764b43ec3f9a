"""FishLeg: the damped inverse Fisher, learned rather than inverted.

`Q(λ)` minimises the auxiliary loss `A(λ) = E_u[½ zᵀF_γ z − uᵀz]`, `z = Q(λ)u`, whose minimiser over
all Q is `F_γ⁻¹`.  Its gradient is that of `⟨F_γz − u, Q(λ)u⟩` with the first factor held fixed: one
Fisher product per step, not differentiated through.

In closed form, which is the default, every update assimilates *Fisher samples*: gradients of single
examples, or of small groups where those do not fit into memory, at labels drawn from the model.
Their second moments along every axis of a leaf give eigenvectors, their squares in these the
eigenvalues, both as running averages; one pass over the data is a fit.

With `learn=True` the first `start` updates do so, and the others learn.  Every update then pulls a
cotangent back through the network by one vjp, and the phase only selects it: the score of
sampled labels, or the Fisher in output space times the jvp of `z`.  So the model is never
differentiated inside a `lax.cond`, where XLA for the CPU runs the gradients of convolutions many
times slower (jax issue 12868).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _chunks, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._devices import axis, sharding
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._fishleg import arguments
from fishleg_jax.inverse._fishleg.blocks import blocks_of
from fishleg_jax.inverse._fishleg.learning import default_optimizer
from fishleg_jax.inverse._fishleg.learning import learn as learn_step
from fishleg_jax.inverse._fishleg.samples import PARTS, draw_probe, group_size, on_mesh, pull, rows
from fishleg_jax.inverse._fishleg.start import assimilate_samples
from fishleg_jax.inverse._fishleg.state import empty_state, multiply_leaves
from fishleg_jax.inverse._kronecker import algebra
from fishleg_jax.inverse._kronecker.units import Unit, make_units
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, split_batch

LEAST = 512  # examples of a one-shot fit, or a small data set would leave label noise in it


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
    learn: bool = False,
    start: int | None = None,
    samples: int | None = None,
    examples_per_sample: int | None = None,
    updates: int | None = None,
    preconditioned: int = 0,
    window: int = 1000,
    examples_per_chunk: int | None = None,
    axis_name: str | None = None,
) -> InverseFisher:
    """The FishLeg estimate: `Q(λ) ≈ (F + γI)⁻¹`, positive definite, learned batch by batch.

    Args:
        model: Model whose Fisher is inverted.
        damping: Damping γ in units of the Fisher per example (nats per squared weight).  None for
            a tenth of a typical entry of the Fisher's diagonal, as measured: the geometric mean
            over weights of the mean entry in their leaf, over leaves of two or more dimensions.
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
        learn: Whether to learn λ after a start in closed form.  A one-shot fit then ends once the
            auxiliary loss of fresh probes no longer falls (`state.progress.settled`), at the latest
            after `updates`.  False, the default, stays in closed form, which follows the Fisher as
            long as there are updates, and costs less.
        start: Number of updates after which the estimate is `ready`; with `learn`, of those in
            closed form.  None for 1, and with `learn` for 64.
        samples: Number of Fisher samples in each batch, one for each of equal parts, which take a
            pass each (fewer if it does not divide the batch).  None, the default, for gradients of
            single examples, or of the smallest groups that leave at most 64 samples, and for which
            they fit into memory; and for 4 parts with `learn`, or with arrays sharded over devices.
        examples_per_sample: Minimum number of examples behind a Fisher sample.  None for 1, and for
            32 with `learn`, because small parts slow down the products of dense networks.
        updates: Number of updates of a one-shot fit, which cycles through its batches.  None for
            `start`, if given; else for one pass over the batches, and as many more as it takes to
            have 512 examples in at least four updates; with `learn`, for `start` and 144 more.
        preconditioned: Number of initial learning updates that use the preconditioned residual
            `Q(F_γz − u)`: faster on badly conditioned problems, but with another fixed point.
        window: Maximum number of updates in the running averages.
        examples_per_chunk: Number of examples processed at a time, which bounds the memory of
            activations; None for the whole batch.  The estimate changes by rounding only, which
            rotates eigenvectors of equal eigenvalues; sampled labels take one more forward pass.
        axis_name: Axis of `shard_map` or `pmap` over which each device has its own batch; the state
            is replicated.  Cannot be combined with `examples_per_chunk`.  None outside of these.

    Returns:
        An `InverseFisher` whose state is a `FishLegState`.  Batches may differ in size and are
        weighted by their number of examples; those of one fit should be alike (shuffled), since
        frames lag behind.  In closed form, unless `samples` is given, `predict` must not depend on
        an example's neighbours in the batch.

    Raises:
        ValueError: An argument out of range; from `init`, an expression that matches no leaf, or a
            stacked leaf of fewer than two dimensions.

    References:
        Garcia, Vernon, Zheng, Bernacchia, Hennequin: Fisher-Legendre (FishLeg) optimization of deep
        neural networks, ICLR 2023, equations 12 to 17.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> params, x = jnp.ones((4, 2)), jax.random.normal(jax.random.key(0), (50, 4))
        >>> estimator = flj.inverse.fishleg(model, damping=0.1)
        >>> state = flj.fit(estimator, params, [(x, None)], key=jax.random.key(1))
        >>> exact = jnp.linalg.inv(x.T @ x / 50 + 0.1 * jnp.eye(4)).diagonal()[:, None]
        >>> bool(jnp.abs(estimator.diagonal(state, params) - exact).max() < 0.05)
        True
    """
    axis.check_name(axis_name)
    _chunks.check_chunk(examples_per_chunk, axis_name)
    learn = numbers.check_flag(learn, "learn")
    arguments.check(model, damping, kind, probe, cap)
    arguments.check_counts(
        start=(start, 1),
        samples=(samples, 1),
        examples_per_sample=(examples_per_sample, 1),
        updates=(updates, 1),
        preconditioned=(preconditioned, 0),
        window=(window, 1),
    )
    optimizer = default_optimizer() if optimizer is None else optimizer
    start, updates, least = arguments.lengths(learn, start, updates, examples_per_sample)
    # single examples need one product per weight and sample, and know no examples beside them
    by_rows = not learn and samples is None

    def units_of(tree) -> tuple[Unit, ...]:
        return make_units(tree, factors, join_bias, cap, stacked)

    def init(params):
        dtype = _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(params)))
        if learn and any(u.factor.rank is not None for u in units_of(params)):
            raise ValueError("learn must be False with factors.low_rank, which is not learned")
        return empty_state(units_of(params), damping, dtype, optimizer if learn else None)

    def update(state, params, batch, key, mask=None):
        if split_batch(batch)[1] is None and (kind == "empirical" or probe == "gradient"):
            raise ValueError(
                f"batch: kind={kind!r} with probe={probe!r} needs labels, but its targets are None"
            )
        params = _tree.widen(params)
        units, tree = units_of(params), jax.tree.structure(params)
        probe_key, label_key = jax.random.split(key)
        starting = state.count < start if learn else True
        examples = _chunks.number_of_examples(batch)

        def masked(leaves):
            return jax.tree.leaves(apply_mask(tree.unflatten(leaves), mask))

        # Fisher samples of single examples, or of small groups of them
        if by_rows and not on_mesh(params, batch, axis_name):
            size = group_size(params, examples, least, examples_per_chunk)
            source = model, params, batch, label_key, kind, size, examples_per_chunk, axis_name
            stacked_samples = masked(jax.tree.leaves(rows(*source)))
            return assimilated(units, state, stacked_samples, mask, examples, True, axis_name)

        # with learning the probe u, and z = Q u with its vjp
        z = None
        if learn:
            u = masked(
                draw_probe(probe, model, params, batch, probe_key, examples_per_chunk, axis_name)
            )
            z, pull_back = jax.vjp(
                lambda c: masked(multiply_leaves(units, state, c, u)), state.coordinates
            )
        # Fisher samples of parts while starting, then Fisher products F z
        pulled = [
            masked(x)
            for x in pull(
                model,
                params,
                batch,
                z if z is None else tree.unflatten(z),
                label_key,
                kind,
                starting,
                (PARTS if samples is None else samples, least),
                examples_per_chunk,
                axis_name,
            )
        ]
        parts = [jnp.stack(leaf) for leaf in zip(*pulled, strict=True)]
        state = assimilated(units, state, parts, mask, examples, starting, None)
        if not learn:
            return state
        # a learning step that does nothing while the start lasts
        return learn_step(
            units,
            state,
            u,
            z,
            [part.mean(0) for part in parts],
            pull_back,
            optimizer,
            examples=on_all_devices(examples),
            active=~starting,
            step=state.count - start,
            preconditioned=preconditioned,
            window=window,
        )

    def on_all_devices(examples):
        return examples if axis_name is None else examples * jax.lax.axis_size(axis_name)

    def assimilated(units, state, samples, mask, examples, active, axis_name):
        def assimilate(state, samples, mask, *active):  # a traced flag belongs to a mesh as well
            return assimilate_samples(
                units,
                state,
                samples,
                mask,
                examples=on_all_devices(examples),
                active=active[0] if active else True,
                window=window,
                measure_damping=damping is None,
                axis_name=axis_name,
            )

        flag = () if active is True else (active,)
        return sharding.automatic(assimilate, state, state, samples, mask, *flag)

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

    def carry(state):  # at a quarter of its weight, but as ready as it was
        count = jnp.maximum(-(-state.count // 4), jnp.minimum(state.count, start))
        seen = state.seen * (count / jnp.maximum(state.count, 1)).astype(state.seen.dtype)
        return state._replace(count=count, seen=seen, framed=jnp.copy(count))  # donated apart

    return spread(
        InverseFisher(
            init,
            update,
            multiply,
            diagonal,
            model=model,
            fisher_diagonal=fisher_diagonal,
            updates=updates,
            examples_per_gradient=1 if by_rows else None,
            examples=LEAST,
            carry=None if learn else carry,
            blocks=functools.partial(blocks_of, units_of),
            ready=lambda state: state.count >= start,
            settled=(lambda state: state.progress.settled) if learn else None,
            axis_name=axis_name,
        ),
        model_outside=True,
    )
