"""K-FAC: one Kronecker product per matrix, from second moments of its gradients."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._devices import sharding
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._gradients import check_damping, sum_over_rows
from fishleg_jax.inverse._kronecker import blocks as _blocks
from fishleg_jax.inverse._kronecker import cholesky, frames
from fishleg_jax.inverse._kronecker.units import Unit, make_units
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model


class KfacState(NamedTuple):
    """State of `kfac`.  Dictionaries are keyed by the key path of a leaf.

    Attributes:
        count: Number of gradients seen.
        skipped: Number of gradients ignored because they were not finite.
        damping: Damping γ; may be changed at any time.
        moments: Sums of second moments along each axis of a matrix.
        squares: Sums of squared gradients of leaves with fewer than two dimensions.
        roots: Inverses `L⁻¹` of the Cholesky factors of the damped factors, laid out like
            `moments`, if the state is prepared for many products; else None.
    """

    count: jax.Array  # shape=(), int32
    skipped: jax.Array  # shape=(), int32
    damping: jax.Array  # shape=(), float
    moments: dict[str, tuple[jax.Array, ...]]
    squares: dict[str, jax.Array | None]
    roots: dict[str, tuple[jax.Array, ...]] | None = None

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def kfac(
    model: Model,
    damping: float = 1e-2,
    *,
    labels: str = "sampled",
    cap: int | None = None,
    stacked: _tree.Stacked = None,
    examples_per_gradient: int = 1,
    examples_per_chunk: int | None = None,
) -> InverseFisher:
    """The K-FAC estimate: `(a + π√γ I)⁻¹ ⊗ (b + √γ/π I)⁻¹` for every matrix, diagonal for the rest.

    The factors are second moments of per-example gradients M of the leaf as a matrix (everything
    else, out): `a = E[M Mᵀ]/√t`, `b = E[Mᵀ M]/√t`, `t = E‖M‖²`.  So layers need not be tagged, and
    shared weights need no special rule.  For a dense layer and one example these are K-FAC's second
    moments of activations and of back-propagated gradients if the two are uncorrelated.

    Args:
        model: Model whose Fisher is estimated.
        damping: Damping γ in units of the Fisher per example; each factor gets its square root,
            balanced by π (the square root of the ratio of the factors' mean eigenvalues).
        labels: Source of the labels: `sampled` (default) from the model for the true Fisher, or
            `empirical` for those of the data.
        cap: Size of the largest block of a factor; None for whole factors.
        stacked: Leaves with a leading axis of layers, as from `nn.scan` and `lax.scan`: regular
            expressions over key paths, or a predicate `(name, leaf)`.  Each layer gets its own
            factors, for the shape without that axis: a leaf of two dimensions is a stack of
            vectors.  None if no leaf is stacked.
        examples_per_gradient: Number of examples averaged into one gradient.
        examples_per_chunk: Number of examples whose gradients are held at a time, which bounds
            memory; None for the whole batch.

    Returns:
        An `InverseFisher` whose state is a `KfacState`.  A fit makes one pass over its batches.
        Every product takes a Cholesky decomposition of the factors, `O(in³ + out³)` per leaf,
        unless the state was prepared for many products by `prepare`.

    Raises:
        ValueError: An argument out of range.

    References:
        Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature,
        ICML 2015, sections 3 and 6.3.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batch = (jax.random.normal(jax.random.key(0), (100, 3)), None)
        >>> estimator, params = flj.inverse.kfac(model, damping=1e-2), jnp.ones((3, 2))
        >>> state = flj.fit(estimator, params, [batch], key=jax.random.key(1))
        >>> bool(jnp.all(estimator.diagonal(state, params) > 0))
        True
    """
    check_model(model)
    check_damping(damping)
    if cap is not None:
        numbers.check_count(cap, "cap", or_none=" or None")
    total_of = sum_over_rows(model, labels, examples_per_gradient, examples_per_chunk)

    def rule(shape, cap):  # Kronecker factors for matrices, a diagonal for other leaves
        matrix = len(shape) > 1 and math.prod(shape) > 1
        return _factors.kronecker(shape, cap) if matrix else _factors.diagonal(shape)

    def units_of(tree) -> tuple[Unit, ...]:
        return make_units(tree, rule, False, cap, stacked)

    def init(params):
        dtype = _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(params)))
        units = units_of(params)
        empty = {u.name: u.repeated(frames.empty_frame(u.factor, dtype).spectrum) for u in units}
        moments = {u.name: u.repeated(frames.zero_moments(u.factor, dtype)) for u in units}
        zero = jnp.zeros((), jnp.int32)
        return KfacState(zero, jnp.zeros_like(zero), jnp.asarray(damping, dtype), moments, empty)

    def update(state, params, batch, key, mask=None):
        def second_moments(gradients):
            moments, squares = {}, {}
            for unit in units_of(params):
                name, rows = unit.name, gradients.leaves[unit.leaves[0]]
                moments[name], squares[name] = (), None
                if unit.factor.spectrum:
                    stack = () if unit.stack is None else (unit.stack,)
                    squares[name] = jnp.sum(rows**2, axis=0).reshape(*stack, *unit.factor.padded)
                else:
                    moments[name] = _sum_of_moments(unit, rows)
            return moments, squares

        new, gradients, skipped = total_of(params, batch, key, mask, second_moments)
        moments, squares = jax.tree.map(jnp.add, (state.moments, state.squares), new)
        return state._replace(
            count=state.count + gradients,
            skipped=state.skipped + skipped,
            moments=moments,
            squares=squares,
            roots=None,  # outdated by the new moments
        )

    def mean_of(state, total):
        count = jnp.maximum(state.count - state.skipped, 1).astype(state.damping.dtype)
        return jax.tree.map(lambda x: x / count, total)

    def triangles_of(state, unit):  # Cholesky factors of the damped factors
        moments = mean_of(state, state.moments[unit.name])
        of_layer = partial(cholesky.triangles, unit.factor, damping=state.damping)
        return unit.one_by_one(of_layer, moments)

    def roots_of(state, unit):
        return tuple(unit.one_by_one(cholesky.inverses, x) for x in triangles_of(state, unit))

    def prepare(state, params):
        roots = {u.name: roots_of(state, u) for u in units_of(params) if not u.factor.spectrum}
        return state._replace(roots=roots)

    def multiply(state, tangent, mask=None):
        tangent = apply_mask(_tree.widen(tangent), mask)
        leaves, tree = jax.tree.flatten(tangent)
        out = list(leaves)
        for unit in units_of(tangent):
            # a diagonal leaf; solves with Cholesky factors; products with their inverses
            vector = unit.pack(leaves)
            if unit.factor.spectrum:
                squares = mean_of(state, state.squares[unit.name])
                product = vector / (squares.reshape(vector.shape) + state.damping)
            elif state.roots is None:
                of_layer = partial(cholesky.solve, unit.factor)
                product = unit.one_by_one(of_layer, triangles_of(state, unit), vector)
            else:
                of_layer = partial(cholesky.by_roots, unit.factor)
                product = unit.each(of_layer, state.roots[unit.name], vector)
            unit.unpack(product, out)
        return apply_mask(tree.unflatten(out), mask)

    def diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out = list(leaves)
        for unit in units_of(params):
            if unit.factor.spectrum:
                squares = mean_of(state, state.squares[unit.name])
                unit.unpack(1 / (squares + state.damping), out)
                continue
            roots = roots_of(state, unit) if state.roots is None else state.roots[unit.name]
            unit.unpack(unit.each(partial(cholesky.diagonal_of, unit.factor), roots), out)
        return apply_mask(tree.unflatten(out), mask)

    def fisher_diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out = list(leaves)
        for unit in units_of(params):
            if unit.factor.spectrum:
                unit.unpack(mean_of(state, state.squares[unit.name]), out)
                continue
            moments = mean_of(state, state.moments[unit.name])
            unit.unpack(unit.each(partial(cholesky.undamped_diagonal, unit.factor), moments), out)
        return apply_mask(tree.unflatten(out), mask)

    def blocks(state, tangent, tiles, fisher):
        def parts_of(unit):
            if unit.factor.spectrum:
                return (mean_of(state, state.squares[unit.name]),)
            if fisher:
                return (mean_of(state, state.moments[unit.name]),)
            return (roots_of(state, unit) if state.roots is None else state.roots[unit.name],)

        def matrix_of(factor, part):
            if factor.spectrum:
                return _blocks.Matrix([], part if fisher else 1 / (part + state.damping))
            return (cholesky.undamped_matrix if fisher else cholesky.inverse_matrix)(factor, part)

        return _blocks.of_units(units_of(tangent), tangent, tiles, parts_of, matrix_of)

    return spread(
        InverseFisher(
            init,
            update,
            multiply,
            diagonal,
            prepare=prepare,
            model=model,
            fisher_diagonal=fisher_diagonal,
            examples_per_gradient=examples_per_gradient,
            blocks=blocks,
        )
    )


def _sum_of_moments(unit: Unit, rows: jax.Array) -> Any:
    """Sums the second moments of gradients one at a time, so that only one set is in memory."""
    of_layer = partial(frames.moments_of, unit.factor)

    def add(total, row):
        return jax.tree.map(jnp.add, total, unit.each(of_layer, row)), None

    def sums(rows):
        empty = unit.repeated(frames.zero_moments(unit.factor, rows.dtype))
        return jax.lax.scan(add, empty, rows)[0]

    return sharding.local(sums, (rows,), (0,), None, examples=True)
