"""Q(λ) for one leaf: a compact positive definite matrix, learned in relative coordinates.

All kinds of factor share one construction.  The leaf is reshaped to a tensor; each axis k may have
a block-diagonal matrix `R_k`, with a diagonal `E` in the middle and a diagonal `D` on both sides:

    Q = D (R_1 ⊗ R_2 ⊗ ...) E (R_1 ⊗ R_2 ⊗ ...)ᵀ D

- `diagonal`: Q = E, without R and D;
- `kronecker`, `convolution`: `R_k = V_k (Λ_k + γ_k)^-½ C_k`, so that `S_k = R_k R_kᵀ` can be any
  positive definite matrix; D is learned, E is the identity;
- `spectral`: `R_k = V_k` is fixed, all of E is learned, one eigenvalue per weight (EKFAC, George
  et al. 2018), and D if `sandwich`;
- `block_diagonal`, `full`: one axis, the flattened leaf, with `R = V (Λ + γ)^-½ C`.

`V`, `Λ` (the *frame*) are eigenvectors and eigenvalues of gradient second moments, set from
data; the damping γ enters at every use, so that a changed damping takes effect at once.  `C` is
lower triangular with a diagonal `exp(·)`, `D` and `E / E_start` are `exp(·)`.  The learned numbers
(the *coordinates*) start at zero and are relative: a step of 0.01 changes Q by about one per cent
at any scale, so that optimisers need not depend on the damping or the network.  Any finite
coordinates give a positive definite Q.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from fishleg_jax import _text

LARGE = 2**17  # weights of a leaf


class Factor(NamedTuple):
    """Structure of Q for one leaf; hashable, without arrays.

    Attributes:
        axes: Shape to which the leaf is reshaped.
        blocks: Number of diagonal blocks of the matrix R of each axis; 0 for an axis without R.
        triangles: Whether the triangular C are learned.
        spectrum: Whether Q has a learned diagonal E in the middle.
        sandwich: Whether Q has a learned outer diagonal D.
        rank: Number of eigenvectors of each of two axes, for `low_rank`; None for other factors.
    """

    axes: tuple[int, ...]
    blocks: tuple[int, ...]
    triangles: bool
    spectrum: bool
    sandwich: bool
    rank: int | None = None

    @property
    def dense_axes(self) -> tuple[int, ...]:
        """Axes with a matrix R."""
        return tuple(k for k, blocks in enumerate(self.blocks) if blocks)

    def block_size(self, axis: int) -> int:
        """Size of one block of an axis; the last block is padded if they do not divide the axis."""
        return -(-self.axes[axis] // self.blocks[axis])

    @property
    def padded(self) -> tuple[int, ...]:
        """Shape `axes` with every axis rounded up to whole blocks."""
        return tuple(
            b * self.block_size(k) if b else self.axes[k] for k, b in enumerate(self.blocks)
        )


class Frame(NamedTuple):
    """Part of Q that is set from data; None for axes without a matrix.

    Attributes:
        vectors: Eigenvectors V of each axis, in columns, of shape (blocks, size, size).
        values: Eigenvalues Λ of each axis, of shape (blocks, size); None with a spectrum.
        spectrum: Second moments that determine E, of shape `padded`; None without a spectrum.
    """

    vectors: tuple[jax.Array | None, ...]
    values: tuple[jax.Array | None, ...]
    spectrum: jax.Array | None

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Coordinates(NamedTuple):
    """Learned λ of one leaf, initially zero; None for parts that are not learned, or for all.

    Attributes:
        triangles: Matrices C of each axis, of shape (blocks, size, size): entries of C below the
            diagonal, their logarithms on it; entries above are unused.
        log_spectrum: Logarithm of E relative to its start, of shape `padded`.
        log_sandwich: Logarithm of D, of shape `axes`.
    """

    triangles: tuple[jax.Array | None, ...] | None
    log_spectrum: jax.Array | None
    log_sandwich: jax.Array | None

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


Constructor = Callable[[tuple[int, ...], int | None], Factor]


def diagonal(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """Diagonal Q: one number per weight.  `cap` is ignored."""
    del cap
    return Factor((math.prod(shape),), (0,), triangles=False, spectrum=True, sandwich=False)


def kronecker(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """Two-factor form `Q = D (S_in ⊗ S_out) D`: the last axis, and all others merged into one.

    For a dense kernel (in, out); for a convolution (spatial·in, out).

    Args:
        shape: Shape of the leaf, of two or more dimensions.
        cap: Size of the largest dense block; a longer axis is cut into equal blocks.  None for
            whole axes.

    Returns:
        The structure of Q.

    Raises:
        ValueError: The leaf has fewer than two dimensions, or the cap is below 1.

    Example:
        >>> from fishleg_jax.inverse import factors
        >>> factors.kronecker((784, 40), cap=128).blocks
        (7, 1)
    """
    return _dense(_merge(shape, 2), (cap,) * 2, triangles=True, sandwich=True)


def convolution(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """Three-factor form `Q = D (S_spatial ⊗ S_in ⊗ S_out) D` for a leaf (*spatial, in, out).

    Arguments and errors as in `kronecker`, for three or more dimensions.
    """
    return _dense(_merge(shape, 3), (cap,) * 3, triangles=True, sandwich=True)


def spectral(
    shape: tuple[int, ...],
    cap: int | None = None,
    *,
    axes: int = 2,
    sandwich: bool = True,
    cap_out: int | None = None,
) -> Factor:
    """Kronecker eigenvectors, free eigenvalues: `Q = D (V_in ⊗ V_out) E (V_in ⊗ V_out)ᵀ D`.

    Args:
        shape: Shape of the leaf, of at least `axes` dimensions.
        cap: Size of the largest dense block; a longer axis is cut into equal blocks.  None for
            whole axes.
        axes: Number of axes of Q: 2 for (everything else, out), 3 for (spatial, in, out).
        sandwich: Whether Q has a learned outer diagonal D (default True).
        cap_out: Size of the largest dense block along the last axis; None for `cap`.

    Returns:
        The structure of Q.

    Raises:
        ValueError: The leaf has fewer than `axes` dimensions, or a cap is below 1.
    """
    caps = (cap,) * (axes - 1) + (cap if cap_out is None else cap_out,)
    return _dense(_merge(shape, axes), caps, spectrum=True, sandwich=sandwich)


def low_rank(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """A few Kronecker eigenvectors over whole axes, for training: diagonal for vectors.

    The `cap` leading eigenvectors `V` of the inputs and `W` of the outputs, one eigenvalue for
    every pair of them, one for each with the rest of the other axis, and one for all the rest.  A
    product costs about `4·cap/(3·batch)` of a gradient, whatever the axes, and neither second
    moments of whole axes nor their eigendecompositions are needed: eigenvectors follow by
    orthogonal iteration.

    Args:
        shape: Shape of the leaf.
        cap: Number of eigenvectors of each axis, at most its size; None for all of them.

    Returns:
        The structure of Q.  It is not learned: `inverse.fishleg` rejects it with `learn=True`.

    Raises:
        ValueError: The cap is below 1.

    Example:
        >>> from fishleg_jax.inverse import factors
        >>> factors.low_rank((784, 1000), cap=64).rank
        64
    """
    if cap is not None and cap < 1:
        raise ValueError(f"cap must be at least 1 or None, got {cap}")
    if len(shape) < 2 or math.prod(shape) <= 1:
        return diagonal(shape)
    axes = _merge(shape, 2)
    rank = max(axes) if cap is None else cap
    return Factor(axes, (0, 0), triangles=False, spectrum=True, sandwich=False, rank=rank)


def block_diagonal(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """Dense blocks of at most `cap` weights along the flattened leaf."""
    return _dense((math.prod(shape),), (cap,), triangles=True)


def full(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """One dense matrix for the whole leaf, for small leaves.  `cap` is ignored."""
    del cap
    return _dense((math.prod(shape),), (None,), triangles=True)


def by_shape(shape: tuple[int, ...], cap: int | None = None) -> Factor:
    """Default structure: diagonal for vectors, `spectral` without its sandwich for other leaves.

    The eigenvalues start at their best values, up to the noise of the samples, and learning an
    outer diagonal as well did not prune better (decision 1 of the documentation).  Without it the
    gradient of the coordinates needs half the products with blocks, which dominate the cost of an
    update.

    A dense kernel gets blocks of half the cap along its inputs and of a quarter along its outputs:
    the outputs of a layer are correlated through the layers after it, which Q does not model, and
    larger blocks prune worse.  A convolution gets blocks of the cap, or of half of it if it has
    more than `LARGE` weights.
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
    # a 1×1 matrix on one of several axes would only duplicate the scale of another part
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
    "low_rank",
    "spectral",
]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
