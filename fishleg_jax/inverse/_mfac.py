"""M-FAC: matrix-free version of the WoodFisher estimate, from a window of the last m gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse import _memory
from fishleg_jax.inverse._gradients import check_damping, gradient_rows
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse._woodbury import groups as _groups
from fishleg_jax.inverse._woodbury import window as _window
from fishleg_jax.inverse._woodbury.blocks import Rows
from fishleg_jax.inverse._woodbury.groups import check_block_size, make_groups
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model


class MfacState(NamedTuple):
    """State of `mfac`.

    Attributes:
        count: Number of gradients seen.
        skipped: Number of gradients ignored because they were not finite.
        used: Whether each slot of the window holds a gradient, of shape (m,).
        damping: Damping γ; may be changed at any time.
        windows: Last m gradients of each group.
        roots: Inverse for each group, if the state is prepared for many products; else None.
    """

    count: jax.Array  # shape=(), int32
    skipped: jax.Array  # shape=(), int32
    used: jax.Array  # shape=(m,), bool
    damping: jax.Array  # shape=(), float
    windows: dict[str, _window.Window]
    roots: dict[str, _window.Root] | None = None

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def mfac(
    model: Model,
    damping: float = 1e-5,
    *,
    window: int = 1000,
    block_size: int | str | None = None,
    labels: str = "empirical",
    examples_per_gradient: int = 1,
    examples_per_chunk: int | None = None,
) -> InverseFisher:
    """The M-FAC estimate: `(γI + Σ g gᵀ / n)⁻¹` of the last n ≤ m gradients, matrix-free.

    Up to m gradients this is the static form; after that each replaces the oldest, which is the
    dynamic form: `O(d m)` for a gradient, `O(d m + m³)` for a product, `m d` numbers.

    Args:
        model: Model whose Fisher is estimated.
        damping: Damping γ in units of the Fisher of the gradients used; the Fisher of means over B
            examples is about B times smaller than that of single examples.
        window: Number of gradients m to keep.
        block_size: Number of weights of a leaf in a block; `leaf` for one block per leaf, None for
            a single block of all weights.  Blocks of at most m weights are solved as matrices of
            their size, larger ones as m×m systems.
        labels: Source of the labels: `empirical` (default) for those of the data, `sampled` for
            labels drawn from the model.
        examples_per_gradient: Number of examples averaged into one gradient.
        examples_per_chunk: Number of examples processed at a time, which bounds the memory of
            computing gradients; None for the whole batch.  All gradients of a batch are in memory
            at once either way.

    Returns:
        An `InverseFisher` whose state is an `MfacState`.  A fit makes one pass over its batches.
        If weights are pruned later, the next update, or `restrict`, masks the stored gradients.

    Raises:
        ValueError: An argument out of range; from `init`, a window that does not fit into memory;
            from `update`, more gradients in a batch than the window holds.

    References:
        Frantar, Kurtic & Alistarh, M-FAC: efficient matrix-free approximations of second-order
        information, NeurIPS 2021, sections 3.1 and 3.2.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batch = jnp.array([[1.0, 0.0]]), jnp.ones(1)  # one gradient, (-1, 0)
        >>> estimator = flj.inverse.mfac(model, damping=1.0)
        >>> state = flj.fit(estimator, jnp.zeros(2), [batch], key=jax.random.key(0))
        >>> estimator.diagonal(state, jnp.zeros(2)).round(5)
        Array([0.5, 1. ], dtype=float32)
    """
    check_model(model)
    check_damping(damping)
    check_block_size(block_size)
    numbers.check_count(window, "window")
    rows_of = gradient_rows(model, labels, examples_per_gradient, examples_per_chunk)

    def init(params):
        # check that the window fits into memory, then allocate it
        groups = make_groups(params, block_size)
        dtype = _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(params)))
        weights = sum(g.weights for g in groups)
        what = f"window={window} for {weights:,} weights"
        per_gradient = weights * dtype.itemsize
        _memory.check(window * per_gradient, what, "window", per_gradient)
        zero = jnp.zeros((), jnp.int32)
        return MfacState(
            count=zero,
            skipped=jnp.zeros_like(zero),
            used=jnp.zeros(window, bool),
            damping=jnp.asarray(damping, dtype),
            windows={g.name: _window.empty(g, window, dtype) for g in groups},
        )

    def update(state, params, batch, key, mask=None):
        leaves, finite = rows_of(params, batch, key, mask)
        if len(finite) > window:
            raise ValueError(
                f"window must be at least {len(finite)}, the number of gradients of a batch, got "
                f"{window}: pass smaller batches or a larger examples_per_gradient"
            )
        # overwrite the oldest slots, and mask the gradients that stay
        slots = (state.count + jnp.arange(len(finite))) % window
        windows = {}
        for group in make_groups(params, block_size):
            parts = group.parts(window)
            rows = [part.pack_rows(leaves) for part in parts]
            pushed = _window.push(state.windows[group.name], rows, slots)
            if mask is not None:
                pushed = _window.mask(pushed, _groups.pack(parts, jax.tree.leaves(mask)))
            windows[group.name] = pushed
        return MfacState(
            count=state.count + len(finite),
            skipped=state.skipped + _tree.count(~finite),
            used=state.used.at[slots].set(finite, unique_indices=True),
            damping=state.damping,
            windows=windows,
        )

    # invert every window once for many products
    def prepare(state, params):
        if state.roots is not None:
            return state
        count = state.used.sum()
        roots = {
            group.name: _window.prepare(state.windows[group.name], count, state.damping)
            for group in make_groups(params, block_size)
        }
        return state._replace(roots=roots)

    def root_of(state, group):
        return None if state.roots is None else state.roots[group.name]

    def multiply(state, tangent, mask=None):
        tangent = apply_mask(_tree.widen(tangent), mask)
        leaves, tree = jax.tree.flatten(tangent)
        out, count = list(leaves), state.used.sum()
        for group in make_groups(tangent, block_size):
            parts, old = group.parts(window), state.windows[group.name]
            x, root = _groups.pack(parts, leaves), root_of(state, group)
            _groups.unpack(parts, _window.multiply(old, count, state.damping, x, root), out)
        return apply_mask(tree.unflatten(out), mask)

    def diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out, count = list(leaves), state.used.sum()
        for group in make_groups(params, block_size):
            args = state.windows[group.name], count, state.damping, root_of(state, group)
            _groups.unpack(group.parts(window), _window.diagonal(*args), out)
        return apply_mask(tree.unflatten(out), mask)

    def fisher_diagonal(state, params, mask=None):
        leaves, tree = jax.tree.flatten(params)
        out, count = list(leaves), state.used.sum()
        for group in make_groups(params, block_size):
            squares = _window.mean_squares(state.windows[group.name], count)
            _groups.unpack(group.parts(window), squares, out)
        return apply_mask(tree.unflatten(out), mask)

    def product(state, tangent):
        leaves, tree = jax.tree.flatten(_tree.widen(tangent))
        out, count = list(leaves), state.used.sum()
        for group in make_groups(tangent, block_size):
            parts, old = group.parts(window), state.windows[group.name]
            x = _groups.pack(parts, leaves)
            _groups.unpack(parts, _window.product(old, count, x), out)
        return tree.unflatten(out)

    def blocks(state, tangent, tiles, fisher):
        leaves, count = jax.tree.leaves(tangent), state.used.sum()
        rows = Rows(leaves, tiles)
        for group in make_groups(tangent, block_size):
            args = group, group.parts(window), state.windows[group.name], count, state.damping
            rows.of_window(*args, root_of(state, group), fisher)
        return rows.found

    # zero pruned weights in the stored gradients, which outdates the inverses
    def restrict(state, mask):
        leaves = jax.tree.leaves(mask)
        windows = {
            group.name: _window.mask(
                state.windows[group.name], _groups.pack(group.parts(window), leaves)
            )
            for group in make_groups(mask, block_size)
        }
        return state._replace(windows=windows, roots=None)

    return spread(
        InverseFisher(
            init,
            update,
            multiply,
            diagonal,
            product=product,
            restrict=restrict,
            prepare=prepare,
            model=model,
            fisher_diagonal=fisher_diagonal,
            examples_per_gradient=examples_per_gradient,
            blocks=blocks,
        )
    )
