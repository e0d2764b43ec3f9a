"""A change of basis of the weights, and models whose parameters are coefficients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax.model import Model, check_model

# matrices of one leaf by axis; a row of a matrix holds the weights of one coefficient
Matrices = Mapping[int, np.ndarray]


class Basis(NamedTuple):
    """Orthonormal change of basis: three functions of a pytree, all jit-compatible.

    Trees keep their structure, shapes and dtypes, so that masks, states of optimisers and names of
    leaves are those of the weights.  Products are in float32 or better and then rounded to the
    leaf's dtype, which may be any but one of whole numbers or booleans: those are a ValueError.

    Attributes:
        coefficients: Function from weights to coefficients.  Gradients and other tangents change
            basis in the same way.
        weights: Function from coefficients to weights, the inverse of `coefficients`.
        bands: Function from parameters to the frequency of every coefficient: the sum of its
            indices along the changed axes, NumPy arrays of int32; 0 in a leaf that keeps its basis.
        name: Name of the function that made the basis.
    """

    coefficients: Callable[[Any], Any]
    weights: Callable[[Any], Any]
    bands: Callable[[Any], Any]
    name: str = "own"

    def __repr__(self) -> str:
        """One line: the name."""
        return f"Basis({self.name})"


def basis_of(
    name: str, matrices_of: Callable[[list[tuple[str, Any]]], Sequence[Matrices]]
) -> Basis:
    """Makes a `Basis` from the matrices of every leaf.

    Args:
        name: Name of the basis.
        matrices_of: Function from the named leaves of a tree to the matrices of every leaf; it
            reads names and shapes only.
    """

    def mapped(function: Callable[[str, Any, Matrices], Any], tree: Any) -> Any:
        leaves = _tree.named_leaves(tree)
        pairs = zip(leaves, matrices_of(leaves), strict=True)
        new = [function(name, leaf, matrices) for (name, leaf), matrices in pairs]
        return jax.tree.unflatten(jax.tree.structure(tree), new)

    def coefficients(params):
        return mapped(_turned, params)

    def weights(params):
        turned_back = lambda name, leaf, own: _turned(name, leaf, {k: m.T for k, m in own.items()})
        return mapped(turned_back, params)

    def bands(params):
        return mapped(lambda _, leaf, own: _band(np.shape(leaf), own), params)

    return Basis(coefficients, weights, bands, name)


def _turned(name: str, leaf: Any, matrices: Matrices) -> Any:
    """Multiplies a leaf with a matrix along each of some axes, in float32 or better."""
    if not matrices:
        return leaf
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):  # whole numbers would be rounded
        raise ValueError(
            f"params: {name!r} must be a floating-point array to change basis, got {leaf.dtype}; "
            "cast it, or leave it in its basis"
        )
    dtype = _tree.wide_dtype(leaf.dtype)
    new = leaf.astype(dtype)
    for axis, matrix in matrices.items():
        turned = jnp.tensordot(
            jnp.asarray(matrix, dtype), new, ((1,), (axis,)), precision=jax.lax.Precision.HIGHEST
        )
        new = jnp.moveaxis(turned, 0, axis)
    return new.astype(leaf.dtype)


def _band(shape: tuple[int, ...], axes: Matrices) -> np.ndarray:
    found = np.zeros(shape, np.int32)
    for axis in axes:
        found += np.expand_dims(
            np.arange(shape[axis], dtype=np.int32),
            [k for k in range(len(shape)) if k != axis % len(shape)],
        )
    return found


def check_basis(basis: Any) -> None:
    """Raises a ValueError for anything but a `Basis`."""
    if not isinstance(basis, Basis):
        name = getattr(basis, "__name__", type(basis).__name__)
        hint = f"; call it: flj.bases.{name}()" if name in ("dct", "identity") else ""
        raise ValueError(f"basis must be a Basis, such as flj.bases.dct(), got {name}{hint}")


def in_basis(model: Model, basis: Basis) -> Model:
    """The same network with coefficients for parameters.

    Everything that takes a model works in the new basis: estimates, scores, masks, patterns,
    compensation, one-shot and gradual pruning.  A pruned coefficient is zero; the weights behind it
    are dense, `basis.weights(coefficients)`, and inference uses those.

    With `w = Bᵀc` the gradient is `∇_c = B ∇_w` and the Fisher `F_c = B F_w Bᵀ`, so damping,
    magnitudes and losses mean the same, and a K-FAC estimate with whole factors is the same
    estimate.  Which entries are small is another matter, and so is every diagonal.

    Args:
        model: Network of the weights.
        basis: Change of basis, such as `bases.dct()`.

    Returns:
        A `Model` whose `predict` takes coefficients in place of the weights.  Its outputs are those
        of the weights up to the rounding of coefficients and weights to their dtype: about 1e-3 of
        the largest in bfloat16.

    Raises:
        ValueError: Another type than a `Model` and a `Basis`.

    References:
        Liu, Xu, Peng & Xiong, Frequency-domain dynamic pruning for convolutional neural networks,
        NeurIPS 2018: coefficients of kernels are pruned, and come back, during training.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> def predict(params, x):
        ...     size = ("NHWC", "HWIO", "NHWC")
        ...     return jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME",
        ...                                         dimension_numbers=size).mean((1, 2))
        >>> model = flj.Model(predict, flj.likelihoods.categorical())
        >>> basis = flj.bases.dct()
        >>> params = {"conv": jax.random.normal(jax.random.key(0), (5, 5, 1, 3))}
        >>> spectral, coefficients = flj.bases.in_basis(model, basis), basis.coefficients(params)
        >>> x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
        >>> difference = spectral.predict(coefficients, x) - model.predict(params, x)
        >>> bool(abs(difference).max() < 1e-5)
        True
    """
    check_model(model)
    check_basis(basis)

    def predict(coefficients, *data):
        return model.predict(basis.weights(coefficients), *data)

    predict.__wrapped__ = model.predict  # shows how many arguments it takes
    return Model(predict, model.likelihood)
