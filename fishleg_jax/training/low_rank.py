"""Optimisers whose states live in low-dimensional subspaces, as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _random, _text, _tree
from fishleg_jax._branch import run_if
from fishleg_jax._checks import arrays, numbers
from fishleg_jax.pruning.gradual import checks as _gradual_checks
from fishleg_jax.training import projection
from fishleg_jax.training.projection import Form

INSIDE = 0.1  # least share of a gradient's length that counts as inside of the subspace
NEVER = 2**31 - 1  # age of bases before the first refresh


class LowRankState(NamedTuple):
    """State of `low_rank_updates`; arrays only.

    Attributes:
        age: Number of steps since the subspaces were refreshed; `refresh` or more when that is due.
        refreshes: Number of refreshes.
        bases: Orthonormal columns (…, small side, rank) of every projected leaf, by its key path.
        inner: State of the inner transformation, in which projected leaves are (…, rank, large
            side).
    """

    age: jax.Array  # shape=(), int32
    refreshes: jax.Array  # shape=(), int32
    bases: dict[str, jax.Array]
    inner: Any

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


def low_rank_updates(
    inner: optax.GradientTransformation,
    rank: int | float,
    refresh: int = 10,
    *,
    subspaces: int = 1,
    residual: bool = True,
    stacked: _tree.Stacked = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that its state lives in low-dimensional subspaces of the kernels.

    Every kernel is a matrix G (small side m, large side n).  With an orthonormal basis P (m, r) of
    leading directions of its gradients the inner transformation sees the coordinates `R = P^T G`
    (r, n), and its update U comes back as `P U`: with Adam, `2 r n + m r` numbers in place of
    `2 m n`.  Every `refresh` steps the basis follows the gradient, and the inner state is rotated
    into it.  With `residual` the rest of the gradient, `G - P R`, is added with the length that
    the inner transformation gives to each column of R, at most tenfold, without any state.

    Axes of kernels with more than two are cut into two groups where the smaller side is largest.
    Leaves with one axis pass whole, as do those for which bases and coordinates would take as many
    numbers as the state without them.

    Args:
        inner: Transformation of gradients with the sign of `optax.scale_by_*`, such as
            `optax.scale_by_adam()`.  It sees no weights: the learning rate, weight decay and
            pruning come behind it in a chain.
        rank: Dimensions of each kernel's subspace, r: a whole number, or a share of the smaller
            side in (0, 1), which is at least 8 dimensions.  With Adam a share of 1/6 leaves a
            quarter of the state of large kernels, or less.
        refresh: Steps between refreshes of the subspaces, 10 by default.
        subspaces: Number of subspaces of each kernel, of `rank / subspaces` dimensions; a refresh
            replaces the oldest.  1 by default, which replaces all.
        residual: Whether to add the scaled rest of the gradient; True by default.
        stacked: Leaves with a leading axis of layers, as from `nn.scan` and `lax.scan`: regular
            expressions over key paths, or a predicate `(name, leaf) -> bool`.  Each layer gets its
            own subspace.  None if no leaf is stacked.
        seed: Seed of the random start of every refresh, 0 by default.

    Returns:
        A transformation whose state is a `LowRankState`.  Updates have the dtype of the gradients;
        bases are in float32 or better.  Gradients that are not finite reach the inner
        transformation, and no basis: a refresh waits for the next finite ones.

    Raises:
        ValueError: An argument out of its range; from `init`, parameters that are not
            floating-point arrays, or an inner transformation that reads the parameters; from
            `update`, gradients of other shapes.

    References:
        Ou et al., Low rank optimization for efficient deep learning, 2023; Zhao et al., GaLore,
        ICML 2024; Chen et al., Fira, 2024, for the residual; Robert et al., LDAdam, ICLR 2025, for
        the rotation.

    Example:
        >>> import jax, jax.numpy as jnp, optax, fishleg_jax as flj
        >>> params = {"kernel": jnp.ones((64, 96)), "bias": jnp.zeros(96)}
        >>> adam = optax.scale_by_adam()
        >>> tx = optax.chain(
        ...     flj.low_rank_updates(adam, 8), optax.scale_by_learning_rate(1e-3)
        ... )
        >>> state = tx.init(params)
        >>> state[0].bases["kernel"].shape, state[0].inner.nu["kernel"].shape
        ((64, 8), (8, 96))
        >>> size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        >>> round(size(state) / size(adam.init(params)), 2)
        0.18
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> updates["kernel"].shape
        (64, 96)
    """
    _check_arguments(inner, rank, refresh, subspaces, seed)
    numbers.check_flag(residual, "residual")
    inner = optax.with_extra_args_support(inner)
    _check_inner(inner, residual)

    def init(params):
        arrays.check_dtypes(params)
        _tree.check_names(_tree.named_leaves(params))
        forms = _chosen(inner, params, rank, stacked)
        bases = {}
        for (name, leaf), (form, own) in zip(_tree.named_leaves(params), forms, strict=True):
            if form is not None:
                eye = jnp.eye(form.small, own, dtype=_tree.wide_dtype(leaf.dtype))
                columns = jnp.broadcast_to(eye, (*form.shape[: form.lead], *eye.shape))
                bases[name] = projection.whole(columns, leaf)
        count = lambda n: projection.whole(jnp.full((), n, jnp.int32), params)  # noqa: E731
        leaves, structure = jax.tree.flatten(params)
        seen = [
            leaf if form is None else _zeros(form, own, leaf)
            for leaf, (form, own) in zip(leaves, forms, strict=True)
        ]
        inner_state = inner.init(structure.unflatten(seen))
        return LowRankState(count(NEVER), count(0), bases, inner_state)

    # Compiled here as well; outside of `jit` the branch would be recompiled every time.
    @jax.jit
    def follow(state, matrices, steps):
        """Refreshes the bases if that is due, and rotates the inner state."""

        def turned(carry):
            bases, inner_state = carry
            key = jax.random.fold_in(jax.random.key(seed), state.refreshes)
            large = {name: matrix.shape[-1] for name, matrix in matrices.items()}
            new, turns, first = {}, {}, state.refreshes == 0
            starts = {
                name: jax.ShapeDtypeStruct((*old.shape[:-2], large[name], old.shape[-1]), old.dtype)
                for name, old in bases.items()
            }
            drawn = dict(zip(starts, _random.like(list(starts.values()), key), strict=True))
            for name, old in bases.items():
                width = max(1, old.shape[-1] // subspaces)
                new[name] = projection.refreshed(old, matrices[name], width, first, drawn[name])
                turns[name] = projection.turn(new[name], old)
            return new, projection.rotated(inner_state, turns, large)

        due = (state.age >= steps) & _tree.all_finite(matrices)
        bases, inner_state = run_if(due, turned, (state.bases, state.inner))
        age = jnp.where(due, 1, jnp.minimum(state.age, NEVER - 1) + 1)
        return LowRankState(age, state.refreshes + due, bases, inner_state)

    def update(updates, state, params=None, **extra):
        del params
        leaves, structure = jax.tree.flatten(updates)
        names = [name for name, _ in _tree.named_leaves(updates)]
        forms = _forms_of(names, leaves, state.bases)
        matrices = {
            name: forms[name].matrix(leaf).astype(state.bases[name].dtype)
            for name, leaf in zip(names, leaves, strict=True)
            if name in forms
        }
        if matrices:
            state = follow(state, matrices, jnp.asarray(refresh))
        # The inner transformation sees coordinates, and whole leaves that have none.
        seen = {name: state.bases[name].mT @ matrix for name, matrix in matrices.items()}
        kept = [seen.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        moved, inner_state = inner.update(structure.unflatten(kept), state.inner, None, **extra)
        # Back to the shapes of the leaves.
        out = []
        for name, leaf, step in zip(names, leaves, jax.tree.leaves(moved), strict=True):
            if name in forms:
                back = _lifted(state.bases[name], matrices[name], seen[name], step, residual)
                step = forms[name].leaf(back, leaf)
            out.append(step)
        return structure.unflatten(out), state._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _lifted(
    basis: jax.Array, matrix: jax.Array, seen: jax.Array, step: jax.Array, residual: bool
) -> jax.Array:
    """Update of a matrix: that of its coordinates, and the scaled rest of the gradient.

    With `U` the step and `s` the ratio of the lengths of its columns to those of R, it is
    `P U + s (G - P R) = P (U - s R) + s G`, which takes one product.  Momentum may move columns
    whose own gradient lies nearly outside of the subspace: there the length of G bounds the ratio.
    """
    if not residual:
        return basis @ step
    length = lambda x: jnp.linalg.norm(x, axis=-2, keepdims=True)  # noqa: E731
    inside = jnp.maximum(length(seen), INSIDE * length(matrix))
    scale = jnp.where(inside > 0, length(step) / jnp.where(inside > 0, inside, 1), 0)
    return basis @ (step - scale * seen) + scale * matrix


def _zeros(form: Form, rank: int, leaf: jax.Array) -> jax.Array:
    """Coordinates of a zero gradient, in float32 or better."""
    zeros = jnp.zeros(form.coordinates(rank), _tree.wide_dtype(leaf.dtype))
    return projection.whole(zeros, leaf)


def _forms_of(
    names: list[str], leaves: list[jax.Array], bases: dict[str, jax.Array]
) -> dict[str, Form]:
    """Forms of the projected leaves, by their key paths; raises a ValueError if they do not fit."""
    by_name, forms = dict(zip(names, leaves, strict=True)), {}
    for name, basis in bases.items():
        leaf = by_name.get(name)
        form = None if leaf is None else projection.form_of(leaf.shape, basis.ndim > 2)
        if form is None or form.small != basis.shape[-2]:
            raise ValueError(
                f"updates: {name!r} must have the shape that init saw, got "
                f"{'no such leaf' if leaf is None else leaf.shape}"
            )
        forms[name] = form
    return forms


def _chosen(
    inner: optax.GradientTransformation, params: Any, rank: int | float, stacked: _tree.Stacked
) -> list[tuple[Form | None, int]]:
    """Form and rank of every leaf in the tree's order; None for those that pass whole."""
    layers = _tree.stacked_leaves(params, stacked, "stacked")
    leaves, structure = jax.tree.flatten(params)
    found = []
    for leaf, layered in zip(leaves, layers, strict=True):
        form = projection.form_of(leaf.shape, layered)
        own = 0 if form is None else form.rank(rank)
        found.append((form if form is not None and own < form.small else None, own))
    # Count the arrays that the inner state has for every leaf.
    shapes = [
        jax.ShapeDtypeStruct(form.coordinates(own), leaf.dtype) if form else leaf
        for leaf, (form, own) in zip(leaves, found, strict=True)
    ]
    state = jax.eval_shape(inner.init, structure.unflatten(shapes))
    names = [name for name, _ in _tree.named_leaves(params)]
    chosen = []
    for name, shape, (form, own) in zip(names, shapes, found, strict=True):
        if form is not None:
            copies = projection.copies(state, name, shape.shape)
            saved = copies * form.large * (form.small - own) - own * form.small
            form = form if saved > 0 else None
        chosen.append((form, own))
    return chosen


def _check_arguments(inner: Any, rank: Any, refresh: Any, subspaces: Any, seed: Any) -> None:
    """Raises a ValueError for an argument of `low_rank_updates` out of its range."""
    _gradual_checks.check_optimizer(inner, "inner")
    if not numbers.is_whole(rank, 1):
        expected = "a whole number of at least 1, or a share of the smaller side in (0, 1)"
        numbers.check_number(rank, "rank", lambda x: 0 < x < 1, expected)
    if not (_gradual_checks.is_array(refresh) or numbers.is_whole(refresh, 1)):
        raise ValueError(
            f"refresh must be a whole number of steps, at least 1, got {_text.shown(refresh)}"
        )
    numbers.check_count(subspaces, "subspaces")
    if numbers.is_whole(rank, 1) and subspaces > rank:
        raise ValueError(f"subspaces must be at most the rank, {rank}, got {subspaces}")
    _gradual_checks.check_seed(seed)


def _check_inner(inner: optax.GradientTransformation, residual: bool) -> None:
    """Raises a ValueError if the inner transformation reads weights, or turns the sign around.

    It is tried on one number, where a transformation of named leaves may fail: that says nothing.
    """
    probe = jnp.ones(())
    try:
        with jax.ensure_compile_time_eval():
            step = inner.update(probe, inner.init(probe), None)[0]
    except ValueError as error:
        if "params" in str(error):
            raise ValueError(
                "inner must not read the weights: put weight decay and the like behind "
                "low_rank_updates in a chain"
            ) from error
        return
    except Exception:
        return
    known = not isinstance(step, jax.core.Tracer)
    if residual and known and float(step) < 0:
        raise ValueError(
            "inner must keep the sign of the gradient, such as optax.scale_by_adam(), with the "
            "learning rate behind low_rank_updates in a chain; or pass residual=False"
        )
