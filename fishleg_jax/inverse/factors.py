"""Q(λ) for one leaf: a positive definite matrix in a few numbers, learned in relative coordinates.

Every kind of factor is one construction.  The leaf is reshaped to a tensor with some number of
axes; each axis k may have a block-diagonal matrix `R_k`, a diagonal `E` stands in the middle and a
diagonal `D` on both sides:

    Q = D (R_1 ⊗ R_2 ⊗ ...) E (R_1 ⊗ R_2 ⊗ ...)ᵀ D

- `diagonal`: no R at all, Q = E;
- `kronecker`, `convolution`: `R_k = V_k (Λ_k + γ_k)^-½ C_k`, so that `S_k = R_k R_kᵀ` is any
  positive definite matrix; D is learned, E is the identity;
- `spectral`: `R_k = V_k` stays, all of E is learned, an eigenvalue for every weight (EKFAC, George
  et al. 2018), and D where there is a sandwich;
- `block_diagonal`, `full`: one axis, the flattened leaf, with `R = V (Λ + γ)^-½ C`.

`V`, `Λ` (the *frame*) are eigenvectors and eigenvalues of gradient second moments, set once from
data; the damping γ enters afresh at every use, so that a changed damping takes effect at once.  `C`
is lower triangular with a diagonal `exp(·)`, `D` and `E / E_start` are `exp(·)`.  What is learned
(the *coordinates*) starts at zero and is relative: a step of 0.01 changes Q by about one per cent
whatever its scale, so that no optimiser needs to know the damping or the network.  Any finite
coordinates give a positive definite Q.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from fishleg_jax import _text

LARGE = 2**17  # weights of a leaf


class Factor(NamedTuple):
    """The structure of Q for one leaf: hashable, no arrays.

    Attributes:
        axes: the shape that the leaf is reshaped to.
        blocks: for each axis, into how many diagonal blocks its matrix R is cut; 0 for an axis
            that has none.
        triangles: whether the C are learned.
        spectrum: whether there is a middle diagonal E, and it is learned.
        sandwich: whether the outer diagonal D is learned.
    """

    axes: tuple[int, ...]
    blocks: tuple[int, ...]
    triangles: bool
    spectrum: bool
    sandwich: bool

    @property
    def dense_axes(self) -> tuple[int, ...]:
        """The axes that have a matrix R."""
        return tuple(k for k, blocks in enumerate(self.blocks) if blocks)

    def block_size(self, axis: int) -> int:
        """The size of one block of an axis; where blocks do not divide it, the last is padded."""
        return -(-self.axes[axis] // self.blocks[axis])

    @property
    def padded(self) -> tuple[int, ...]:
        """The shape `axes` with every axis rounded up to whole blocks."""
        return tuple(
            b * self.block_size(k) if b else self.axes[k] for k, b in enumerate(self.blocks)
        )


class Frame(NamedTuple):
    """The part of Q that is set from data and then stays.  None where an axis has no matrix.

    Attributes:
        vectors: for each axis the eigenvectors V, of shape (blocks, size, size), in columns.
        values: for each axis the eigenvalues Λ, of shape (blocks, size); None with a spectrum.
        spectrum: the second moments that belong to E, of the shape `padded`; None without one.
    """

    vectors: tuple[jax.Array | None, ...]
    values: tuple[jax.Array | None, ...]
    spectrum: jax.Array | None

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Coordinates(NamedTuple):
    """The learned λ of one leaf, zero at the start.  None where a part is not learned.

    Attributes:
        triangles: for each axis (blocks, size, size): below the diagonal C itself, on the diagonal
            its logarithm; what stands above is not used.
        log_spectrum: the logarithm of E over its start, of the shape `padded`.
        log_sandwich: the logarithm of D, of the shape `axes`.
    """

    triangles: tuple[jax.Array | None, ...]
    log_spectrum: jax.Array | None
    log_sandwich: jax.Array | None

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


Constructor = Callable[[tuple[int, ...], int | None], Factor]


def diagonal(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """A diagonal Q: one number a weight.  `cap` is not used."""
    del cap
    return Factor((math.prod(shape),), (0,), triangles=False, spectrum=True, sandwich=False)


def kronecker(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """`Q = D (S_in ⊗ S_out) D`: the last axis against all others taken together.

    For a dense kernel (in, out); for a convolution the two-factor form (spatial·in, out).

    Args:
        shape: the leaf's shape, of two or more dimensions.
        cap: the largest dense block; a longer axis is cut into equal blocks.  None for no cap.

    Returns:
        The structure.

    Raises:
        ValueError: the leaf has fewer than two dimensions, or the cap is below one.

    Example:
        >>> from fishleg_jax.inverse import factors
        >>> factors.kronecker((784, 40), cap=128).blocks
        (7, 1)
    """
    return _dense(_merge(shape, 2), (cap,) * 2, triangles=True, sandwich=True)


def convolution(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """`Q = D (S_spatial ⊗ S_in ⊗ S_out) D` for a leaf (*spatial, in, out).  See `kronecker`."""
    return _dense(_merge(shape, 3), (cap,) * 3, triangles=True, sandwich=True)


def spectral(
    shape: tuple[int, ...],
    cap: int | None = None,
    *,
    axes: int = 2,
    sandwich: bool = True,
    cap_out: int | None = None,
) -> Factor:
    """`Q = D (V_in ⊗ V_out) E (V_in ⊗ V_out)ᵀ D`: Kronecker eigenvectors, free eigenvalues.

    Args:
        shape: the leaf's shape, of two or more dimensions.
        cap: see `kronecker`.
        axes: 2 for (everything else, out), 3 for (spatial, in, out).
        sandwich: whether there is an outer diagonal D.
        cap_out: the largest dense block along the last axis, where it is another than `cap`.

    Returns:
        The structure.
    """
    caps = (cap,) * (axes - 1) + (cap if cap_out is None else cap_out,)
    return _dense(_merge(shape, axes), caps, spectrum=True, sandwich=sandwich)


def block_diagonal(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """Dense blocks of at most `cap` along the flattened leaf."""
    return _dense((math.prod(shape),), (cap,), triangles=True)


def full(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """One dense matrix for the whole leaf: for small leaves.  `cap` is not used."""
    del cap
    return _dense((math.prod(shape),), (None,), triangles=True)


def by_shape(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """The default: diagonal for vectors, `spectral` without its sandwich for all else.

    The eigenvalues start at their best values, up to the noise of the samples, and no outer
    diagonal that was learned beside them pruned better (see the README).  Without one the gradient
    of the coordinates needs half the products with blocks, which are what an update mostly costs.

    A dense kernel gets blocks of half the cap along its inputs and of a quarter along its outputs:
    the outputs of a layer are correlated through the layers that follow, of which Q knows nothing,
    and larger blocks prune worse.  A convolution gets blocks of the cap, and of half of it if it
    has more than `LARGE` weights.
    """
    if len(shape) < 2:
        return diagonal(shape)
    if len(shape) == 2:
        return spectral(shape, _share(cap, 2), cap_out=_share(cap, 4), sandwich=False)
    return spectral(
        shape, _share(cap, 2 if math.prod(shape) > LARGE else 1), axes=3, sandwich=False
    )


def _share(cap: int | None, divisor: int) -> int | None:
    return None if cap is None else max(cap // divisor, min(cap, 1))


def _merge(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    if len(shape) < axes:
        raise ValueError(
            f"shape must have {axes} or more dimensions for this factor, got {shape}; "
            "use diagonal, block_diagonal or full"
        )
    return (math.prod(shape[: len(shape) - axes + 1]), *shape[len(shape) - axes + 1 :])


def _dense(
    axes: tuple[int, ...],
    caps: tuple[int | None, ...],
    *,
    triangles: bool = False,
    spectrum: bool = False,
    sandwich: bool = False,
) -> Factor:
    for cap in caps:
        if cap is not None and cap < 1:
            raise ValueError(f"cap must be at least 1 or None, got {cap}")
    # a matrix of size one along one of several axes would only double the scale of another part
    blocks = tuple(
        0 if n == 1 and len(axes) > 1 else -(-n // (cap or n))
        for n, cap in zip(axes, caps, strict=True)
    )
    return Factor(axes, blocks, triangles, spectrum, sandwich)


__all__ = [
    "Constructor",
    "Coordinates",
    "Factor",
    "Frame",
    "block_diagonal",
    "by_shape",
    "convolution",
    "diagonal",
    "full",
    "kronecker",
    "spectral",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
