"""WoodFisher: block-diagonal damped inverse of the Fisher of m gradients, updated as they come."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers as _scalars
from fishleg_jax._devices import sharding
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse import _memory
from fishleg_jax.inverse._gradients import check_damping, gradient_rows
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse._woodbury import groups as _groups
from fishleg_jax.inverse._woodbury import square_root, window
from fishleg_jax.inverse._woodbury.blocks import Rows
from fishleg_jax.inverse._woodbury.groups import Group, check_block_size, make_groups
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model


class WoodFisherState(NamedTuple):
    """State of `woodfisher`.

    Attributes:
        count: Number of gradients seen; those after the m-th are ignored.
        skipped: Number of gradients ignored because they were not finite.
        damping: Damping γ; fixed at the start for blocks stored as a square root, on which a later
            change has no effect.
        blocks: For each group a square root of `F_γ⁻¹` of shape (blocks, c, c), or, for blocks with
            more weights than gradients, the gradients themselves as a `Window`.
        squares: For each group stored as a square root, the sum of its squared gradients, of shape
            (blocks, c).
        roots: Inverse of every `Window`, if the state is prepared for many products; else None.
    """

    count: jax.Array  # shape=(), int32
    skipped: jax.Array  # shape=(), int32
    damping: jax.Array  # shape=(), float
    blocks: dict[str, Any]
    squares: dict[str, jax.Array]
    roots: dict[str, window.Root] | None = None

    @property
    def fixed_damping(self) -> bool:
        """Whether the damping is part of the fit, as in blocks kept as a square root."""
        return any(isinstance(block, jax.Array) for block in self.blocks.values())

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def woodfisher(
    model: Model,
    damping: float = 1e-5,
    *,
    gradients: int = 1000,
    block_size: int | str | None = None,
    labels: str = "empirical",
    examples_per_gradient: int = 1,
    examples_per_chunk: int | None = None,
) -> InverseFisher:
    """The WoodFisher estimate: `(γI + Σ g gᵀ / m)⁻¹` of m gradients, in blocks.

    Args:
        model: Model whose Fisher is estimated.
        damping: Damping γ in units of the Fisher of the gradients used; the Fisher of means over B
            examples is about B times smaller than that of single examples.
        gradients: Number of gradients m of the whole fit; later ones are ignored.  The sum is
            divided by m from the first gradient on: after n < m gradients the estimate is the one
            at a damping of `γ m / n`, times `m / n`.
        block_size: Number of weights c in a dense block: `6 m c d` operations and `c d` numbers for
            d weights.  `leaf` for one block per leaf, None for a single block of all weights; with
            these two, blocks with more weights than gradients store the gradients instead, `m d`
            numbers.
        labels: Source of the labels: `empirical` (default) for those of the data, `sampled` for
            labels drawn from the model.
        examples_per_gradient: Number of examples averaged into one gradient.
        examples_per_chunk: Number of examples processed at a time, which bounds the memory of
            computing gradients; None for the whole batch.  All gradients of a batch are in memory
            at once either way.

    Returns:
        An `InverseFisher` whose state is a `WoodFisherState`.  A fit makes one pass over its
        batches and needs the same mask throughout.

    Raises:
        ValueError: An argument out of range; from `init`, blocks that do not fit into memory.

    References:
        Singh & Alistarh, WoodFisher: efficient second-order approximation for neural network
        compression, NeurIPS 2020, equations 3 and 9.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batch = jnp.array([[1.0, 0.0]]), jnp.ones(1)  # one gradient, (-1, 0)
        >>> estimator = flj.inverse.woodfisher(model, damping=1.0, gradients=1)
        >>> state = flj.fit(estimator, jnp.zeros(2), [batch], key=jax.random.key(0))
        >>> estimator.diagonal(state, jnp.zeros(2)).round(5)
        Array([0.5, 1. ], dtype=float32)
    """
    check_model(model)
    check_damping(damping)
    check_block_size(block_size)
    _scalars.check_count(gradients, "gradients")
    rows_of = gradient_rows(model, labels, examples_per_gradient, examples_per_chunk)

    # blocks are stored as square roots, except large ones without a block size
    def has_root(group: Group) -> bool:
        return isinstance(block_size, int) or group.size <= gradients

    def init(params):
        groups = make_groups(params, block_size)
        dtype = _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(params)))
        _check_memory(groups, has_root, gradients, block_size, dtype)
        gamma = jnp.asarray(damping, dtype)
        blocks = {
            g.name: square_root.start(g.blocks, g.size, gamma)
            if has_root(g)
            else window.empty(g, gradients, dtype)
            for g in groups
        }
        zero = jnp.zeros((), jnp.int32)
        squares = {g.name: jnp.zeros((g.blocks, g.size), dtype) for g in groups if has_root(g)}
        return WoodFisherState(zero, jnp.zeros_like(zero), gamma, blocks, squares)

    def update(state, params, batch, key, mask=None):
        leaves, finite = rows_of(params, batch, key, mask)
        # gradients after the m-th get weight 0, or a slot outside the window
        slots = state.count + jnp.arange(len(finite))
        wanted = (slots < gradients).astype(state.damping.dtype)

        def extended(group, old):
            if has_root(group):
                rows = group.pack_rows(leaves)
                rows = sharding.halfway(rows * (wanted / gradients**0.5)[:, None], 0, 1)
                return sharding.local(square_root.extend, (old, rows), (0, 0), 0)
            rows = [part.pack_rows(leaves) for part in group.parts(gradients)]
            return window.push(old, rows, slots)

        def squared(group, old):
            rows = group.pack_rows(leaves) * wanted[:, None]
            return old + jnp.sum(rows**2, axis=1)

        groups = make_groups(params, block_size)
        return WoodFisherState(
            count=state.count + len(finite),
            skipped=state.skipped + _tree.count(~finite),
            damping=state.damping,
            blocks={g.name: extended(g, state.blocks[g.name]) for g in groups},
            squares={g.name: squared(g, state.squares[g.name]) for g in groups if has_root(g)},
        )

    # square roots need no preparation: invert the windows only
    def prepare(state, params):
        if state.roots is not None:
            return state
        count = jnp.asarray(gradients)
        roots = {
            group.name: window.prepare(state.blocks[group.name], count, state.damping)
            for group in make_groups(params, block_size)
            if not has_root(group)
        }
        return state._replace(roots=roots)

    def root_of(state, group):
        return None if state.roots is None else state.roots[group.name]

    def multiply(state, tangent, mask=None):
        tangent = apply_mask(_tree.widen(tangent), mask)
        leaves, tree = jax.tree.flatten(tangent)
        out = list(leaves)
        for group in make_groups(tangent, block_size):
            # A Aᵀ v, or the Woodbury identity with the gradients in the window
            old = state.blocks[group.name]
            if has_root(group):
                group.unpack(square_root.multiply(old, group.pack(leaves)), out)
            else:
                parts = group.parts(gradients)
                x = _groups.pack(parts, leaves)
                args = old, jnp.asarray(gradients), state.damping, x, root_of(state, group)
                _groups.unpack(parts, window.multiply(*args), out)
        return apply_mask(tree.unflatten(out), mask)

    def diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out = list(leaves)
        for group in make_groups(params, block_size):
            old = state.blocks[group.name]
            if has_root(group):
                group.unpack(square_root.diagonal(old), out)
            else:
                args = old, jnp.asarray(gradients), state.damping, root_of(state, group)
                _groups.unpack(group.parts(gradients), window.diagonal(*args), out)
        return apply_mask(tree.unflatten(out), mask)

    def fisher_diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out = list(leaves)
        for group in make_groups(params, block_size):
            if has_root(group):
                group.unpack(state.squares[group.name] / gradients, out)
            else:
                squares = window.mean_squares(state.blocks[group.name], jnp.asarray(gradients))
                _groups.unpack(group.parts(gradients), squares, out)
        return apply_mask(tree.unflatten(out), mask)

    def blocks(state, tangent, tiles, fisher):
        rows = Rows(jax.tree.leaves(tangent), tiles)
        for group in make_groups(tangent, block_size):
            old = state.blocks[group.name]
            if has_root(group):
                rows.of_root(group, old, state.damping, fisher)
            else:
                args = group, group.parts(gradients), old, jnp.asarray(gradients), state.damping
                rows.of_window(*args, root_of(state, group), fisher)
        return rows.found

    return spread(
        InverseFisher(
            init,
            update,
            multiply,
            diagonal,
            prepare=prepare,
            ready=lambda state: state.count >= gradients,
            model=model,
            fisher_diagonal=fisher_diagonal,
            gradients=gradients,
            examples_per_gradient=examples_per_gradient,
            blocks=blocks,
        )
    )


def _check_memory(groups, has_root, gradients, block_size, dtype) -> None:
    numbers = sum(g.blocks * g.size * (g.size if has_root(g) else gradients) for g in groups)
    weights = sum(g.weights for g in groups)
    if isinstance(block_size, int):
        # counts full blocks: the savings of smaller last blocks are not worth a second figure
        needed = min(block_size, max(g.size for g in groups)) * weights * dtype.itemsize
        _memory.check(
            max(needed, numbers * dtype.itemsize),
            f"block_size={block_size} for {weights:,} weights",
            "block_size",
            weights * dtype.itemsize,
        )
    else:
        _memory.check(
            numbers * dtype.itemsize,
            f"gradients={gradients} for {weights:,} weights",
            "gradients",
            weights * dtype.itemsize,
        )
