"""Kinds of bases: the discrete cosine transform, matrices of the user's own, and none."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fishleg_jax import _prunable, _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax.bases.basis import Basis, Matrices, basis_of

TOLERANCE = 1e-5  # of the entries of MMᵀ − I for a matrix that was rounded to float32


def identity() -> Basis:
    """The basis that the weights are in: coefficients are weights.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.bases.identity().coefficients({"w": jnp.ones(2)})
        {'w': Array([1., 1.], dtype=float32)}
    """
    return basis_of("identity", lambda leaves: [{} for _ in leaves])


def dct(
    prunable: _prunable.LeafSelection = None, *, axes: int | Sequence[int] | None = None
) -> Basis:
    """Discrete cosine transform (DCT-II, orthonormal) of kernels along their spatial axes.

    Of an n × n kernel coefficient (k, l) belongs to
    `c_k c_l Σ_ij w_ij cos(π(2i+1)k / 2n) cos(π(2j+1)l / 2n)`, `c_0 = √(1/n)` and else `√(2/n)`.
    Smooth kernels have small coefficients at high frequencies.

    Args:
        prunable: Leaves that change basis: regular expressions over key paths, a mapping from them
            to True or False, a pytree of booleans like the parameters, or a predicate
            `(name, leaf)`.  None, the default, for convolutions: leaves whose own name or layer's
            name contains `conv` in any case, of three or four dimensions, or with `axes` of three
            or more.  Kernels of attention have as many dimensions and nothing spatial; a leaf of
            five may be a 3-D convolution or a stack of layers, so name it.
        axes: Axes of the transform.  None, the default, for all but the last two, as in kernels of
            flax, (height, width, in, out); `(2, 3)` for kernels (out, in, height, width), `(1, 2)`
            for kernels of flax behind an axis of layers.  A leaf with nothing along these axes
            stays as it is.

    Returns:
        The basis.  Its functions raise a ValueError for parameters in which nothing changes, and
        for a leaf in which two of the axes are the same, such as 0 and -4 of four dimensions.

    Raises:
        ValueError: Axes that are not whole numbers, or named twice.

    References:
        Ahmed, Natarajan & Rao, Discrete cosine transform, 1974; Liu, Xu, Peng & Xiong,
        Frequency-domain dynamic pruning for convolutional neural networks, NeurIPS 2018.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> basis = flj.bases.dct()
        >>> coefficients = basis.coefficients({"conv": jnp.ones((3, 3, 2, 2))})["conv"]
        >>> coefficients[:, :, 0, 0].round(5) + 0  # a constant kernel has one
        Array([[3., 0., 0.],
               [0., 0., 0.],
               [0., 0., 0.]], dtype=float32)
    """
    _prunable.check_type(prunable, "prunable")
    given = None if axes is None else _checked_axes(axes)
    # a mapping that only excludes leaves starts from the default, too
    excludes = isinstance(prunable, Mapping) and not any(prunable.values())
    by_default = prunable is None or excludes

    def matrices_of(leaves):
        names = dict(leaves)
        chosen = _prunable.select(names, prunable, "prunable")
        order = dict(zip(names, chosen, strict=True))
        found = []
        for name, leaf in leaves:
            shape = np.shape(leaf)
            taken = order[name] and not (by_default and not _is_spatial(name, shape, given))
            own = range(len(shape) - 2) if given is None else given
            fits = _positions(own, name, shape, "axes") if taken else []
            found.append({k: _dct_matrix(shape[k]) for k in fits if shape[k] > 1})
        if not any(found):
            shapes = ", ".join(f"{name} {np.shape(leaf)}" for name, leaf in leaves)
            where = "their axes before the last two" if given is None else f"axes {given}"
            hint = "; by default only convolutions change, so name the leaves" if by_default else ""
            raise ValueError(
                f"prunable selects no leaf that is longer than 1 along {where}{hint}, got {shapes}"
            )
        return found

    return basis_of("dct", matrices_of)


def orthonormal(matrices: Mapping[str, Mapping[int, Any]]) -> Basis:
    """Basis by orthonormal matrices of the user's own, along any axes of any leaves.

    Args:
        matrices: Matrices by axis, by regular expressions over key paths; the first expression that
            matches a leaf decides.  A matrix of shape (n, n) belongs to an axis of n weights, and
            coefficient k is the product of its row k with them.  Eigenvectors go in as rows.

    Returns:
        The basis.  Its functions raise a ValueError for an expression that matches no leaf, for an
        axis of another size, and for one that is named twice, such as 0 and -2 of a matrix.

    Raises:
        ValueError: A matrix that is not orthonormal to 1e-5, or another type.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> turn = jnp.array([[0.6, 0.8], [-0.8, 0.6]])
        >>> basis = flj.bases.orthonormal({"kernel": {0: turn}})
        >>> basis.coefficients({"kernel": jnp.array([[3.0], [4.0]])})
        {'kernel': Array([[5.],
               [0.]], dtype=float32)}
    """
    if not isinstance(matrices, Mapping) or not matrices:
        raise ValueError(
            "matrices must map regular expressions to matrices by axis, such as "
            f"{{'kernel': {{0: matrix}}}}, got {_text.shown(matrices)}"
        )
    rules = {pattern: _checked_matrices(pattern, own) for pattern, own in matrices.items()}

    def matrices_of(leaves):
        found = {pattern: _tree.matches(pattern, leaves, "matrices") for pattern in rules}
        own: list[Matrices] = []
        for i, (name, leaf) in enumerate(leaves):
            hit = next((pattern for pattern in rules if found[pattern][i]), None)
            own.append({} if hit is None else rules[hit])
            _check_fit(name, np.shape(leaf), own[-1])
        return own

    return basis_of("orthonormal", matrices_of)


def _dct_matrix(size: int) -> np.ndarray:
    k, n = np.ogrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * n + 1) * k / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def _checked_axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    found = axes if isinstance(axes, (tuple, list)) else (axes,)
    whole = all(numbers.is_whole(k, -(2**31)) for k in found)
    if not whole or not found or len(set(found)) < len(found):
        raise ValueError(f"axes must be different whole numbers or None, got {_text.shown(axes)}")
    return tuple(int(k) for k in found)


def _positions(axes: Iterable[int], name: str, shape: tuple[int, ...], argument: str) -> list[int]:
    """Axes of a leaf counted from 0, without those that it lacks; a ValueError if two are equal."""
    there = [k for k in axes if -len(shape) <= k < len(shape)]
    found = [k % len(shape) for k in there]
    if len(set(found)) < len(found):
        raise ValueError(
            f"{argument} must name every axis once, but of {tuple(there)} two are the same axis of "
            f"{name!r}, which has shape {shape}"
        )
    return found


def _is_spatial(name: str, shape: tuple[int, ...], axes: Sequence[int] | None) -> bool:
    """Whether a leaf is taken for a kernel of a convolution, by its names and dimensions."""
    parts = [part.lower() for part in name.split("/") if not part.isdigit()]
    named = any("conv" in part for part in parts[-2:])  # the leaf and its layer
    return named and 3 <= len(shape) <= (4 if axes is None else len(shape))


def _checked_matrices(pattern: Any, own: Any) -> dict[int, np.ndarray]:
    if not isinstance(pattern, str) or not isinstance(own, Mapping) or not own:
        raise ValueError(
            "matrices must map regular expressions to matrices by axis, got "
            f"{pattern!r}: {_text.shown(own)}"
        )
    found = {}
    for axis in _checked_axes(list(own)):
        matrix = np.asarray(own[axis], np.float64)
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        if not square or not np.abs(matrix @ matrix.T - np.eye(len(matrix))).max() <= TOLERANCE:
            off = f", off by {np.abs(matrix @ matrix.T - np.eye(len(matrix))).max():.1g}"
            raise ValueError(
                f"matrices: that of {pattern!r} for axis {axis} must be square and orthonormal to "
                f"{TOLERANCE:g}, got shape {matrix.shape}{off if square else ''}"
            )
        found[axis] = matrix
    return found


def _check_fit(name: str, shape: tuple[int, ...], matrices: Matrices) -> None:
    _positions(matrices, name, shape, "matrices")
    for axis, matrix in matrices.items():
        if not -len(shape) <= axis < len(shape) or shape[axis] != len(matrix):
            raise ValueError(
                f"matrices: {name!r} of shape {shape} must have size {len(matrix)} along axis "
                f"{axis} for a matrix of that size"
            )
