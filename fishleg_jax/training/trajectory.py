"""Training in the subspace that an earlier training moved in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fishleg_jax import _text, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax.pruning.gradual.checks import check_optimizer

HIGHEST = jax.lax.Precision.HIGHEST
RELATIVE = 1e-7  # variance of a direction, over the largest, below which it is rounding


class SubspaceState(NamedTuple):
    """State of `within_subspace`.

    Attributes:
        basis: Orthonormal directions, each leaf (rank, *shape of the leaf).
        inner: State of the inner transformation, for `rank` numbers.
    """

    basis: Any
    inner: Any

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


def trajectory_subspace(checkpoints: Sequence[Any], rank: int) -> Any:
    """Finds the directions that a training has moved in: principal components of its checkpoints.

    The directions are linear combinations of the checkpoints, whose coefficients are eigenvectors
    of a matrix of `checkpoints` by `checkpoints` inner products; no matrix has the size of the
    weights squared.

    Args:
        checkpoints: Parameters at some steps of a training, pytrees of the same structure, more
            than `rank`.
        rank: Number of directions.

    Returns:
        Pytree like the parameters, each leaf (rank, *shape) in float32 or better: orthonormal over
        the whole tree, the direction with the largest variance first.

    Raises:
        ValueError: Checkpoints that are too few, differ in structure or shapes, or are not finite
            floating-point arrays; a rank above the number of directions that they span.

    References:
        Li et al., Low dimensional trajectory hypothesis is true: DNNs can be trained in tiny
        subspaces, IEEE TPAMI 2022; Ou et al., Low rank optimization for efficient deep learning,
        2023.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> steps = [{"w": jnp.array([t, 2.0 * t]), "b": jnp.array(2.0 * t)} for t in range(4)]
        >>> basis = flj.trajectory_subspace(steps, 1)
        >>> abs(basis["w"]), abs(basis["b"])
        (Array([[0.33333334, 0.6666667 ]], dtype=float32), Array([0.6666667], dtype=float32))
    """
    rank = numbers.check_count(rank, "rank")
    if not isinstance(checkpoints, Sequence) or len(checkpoints) <= rank:
        found = len(checkpoints) if isinstance(checkpoints, Sequence) else type(checkpoints)
        raise ValueError(
            f"checkpoints must be a list of more parameters than the rank, {rank}, got {found}"
        )
    for i, one in enumerate(checkpoints):
        _tree.check_same(checkpoints[0], one, f"checkpoints[{i}]")
        arrays.check_params(one)
    gathered = jax.tree.map(lambda *x: jnp.stack(x), *map(_tree.widen, checkpoints))
    moved = jax.tree.map(lambda x: x - x[0], gathered)  # exact zeros where nothing has moved
    moved = jax.tree.map(lambda x: x - x.mean(0), moved)
    # Eigenvectors of the inner products, on the host in double precision.
    variances, vectors = np.linalg.eigh(_products(moved))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    spanned = int((variances > RELATIVE * variances[0]).sum()) if variances[0] > 0 else 0
    if rank > spanned:
        raise ValueError(
            f"rank must be at most the number of directions that the checkpoints span, {spanned}, "
            f"got {rank}"
        )
    basis = _combined(moved, vectors[:, :rank] / np.sqrt(variances[:rank]))
    # Once more, against rounding in directions of little variance.
    lower = np.linalg.cholesky(_products(basis))
    return _combined(basis, np.linalg.inv(lower).T)


def within_subspace(
    inner: optax.GradientTransformation, basis: Any
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that it trains coordinates in a fixed subspace of all weights.

    With orthonormal directions B the inner transformation sees `B^T g`, as many numbers as there
    are directions, and its update u comes back as `B u`.

    Args:
        inner: Transformation of gradients, such as `optax.adam(0.1)`.  It sees no weights.
        basis: Orthonormal directions of the whole tree, each leaf (rank, *shape of the leaf), from
            `trajectory_subspace`.

    Returns:
        A transformation whose state is a `SubspaceState` with a copy of the basis.

    Raises:
        ValueError: An invalid optimiser or basis; from `init` and `update`, parameters or gradients
            of other shapes than those of the basis.

    References:
        Li et al., Low dimensional trajectory hypothesis is true, IEEE TPAMI 2022, algorithm 1.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> tx = flj.within_subspace(optax.sgd(1.0), jnp.array([[0.6, 0.8, 0.0]]))
        >>> params = jnp.zeros(3)
        >>> updates, _ = tx.update(jnp.array([-1.0, -0.5, 9.0]), tx.init(params))
        >>> updates
        Array([0.6, 0.8, 0. ], dtype=float32)
    """
    check_optimizer(inner, "inner")
    arrays.check_dtypes(basis)
    ranks = {leaf.shape[:1] for leaf in jax.tree.leaves(basis)}
    if len(ranks) != 1 or () in ranks:
        raise ValueError(
            "basis must have the same number of directions in every leaf, its first axis, got "
            f"{sorted(ranks)}"
        )
    inner = optax.with_extra_args_support(inner)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), basis)

    def init(params):
        _tree.check_same(like, params, "params")
        dtype = jnp.result_type(*jax.tree.leaves(basis))
        return SubspaceState(jax.tree.map(jnp.copy, basis), inner.init(jnp.zeros(*ranks, dtype)))

    def update(updates, state, params=None, **extra):
        del params
        _tree.check_same(like, updates, "updates")
        along = jax.tree.map(
            lambda b, g: jnp.tensordot(b, g.astype(b.dtype), g.ndim, precision=HIGHEST),
            state.basis,
            updates,
        )
        moved, inner_state = inner.update(sum(jax.tree.leaves(along)), state.inner, None, **extra)
        lifted = jax.tree.map(
            lambda b, g: jnp.tensordot(moved, b, 1, precision=HIGHEST).astype(g.dtype),
            state.basis,
            updates,
        )
        return lifted, SubspaceState(state.basis, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _leaf_products(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(len(leaf), -1)
    return jnp.matmul(flat, flat.T, precision=HIGHEST)


def _products(tree: Any) -> np.ndarray:
    """Inner products of all pairs of directions, added over the leaves in double precision."""
    return sum(np.asarray(_leaf_products(x), np.float64) for x in jax.tree.leaves(tree))


def _combined(tree: Any, coefficients: np.ndarray) -> Any:
    """Linear combinations of directions: coefficients (directions, combinations)."""

    def one(x):
        return jnp.tensordot(jnp.asarray(coefficients.T, x.dtype), x, 1, precision=HIGHEST)

    return jax.tree.map(one, tree)
