"""Low-rank factors: a few eigenvectors of each axis, and one eigenvalue for all directions besides.

For a leaf of shape (n, m) with eigenvectors `V` (n, r) and `W` (m, s) the Fisher is represented as
constant on the parts into which these cut the space: `v_i ⊗ w_j`, `v_i ⊗ rest`, `rest ⊗ w_j` and
`rest ⊗ rest`.  The mean squares of Fisher samples there are the eigenvalues, the spectrum of shape
(r + 1, s + 1), with those of the rest in the last row and column.  Products take `4 n m (r + s)`
operations, and second moments are never formed: moments are the products `A V` of each axis' second
moment A with its eigenvectors, from which a step of the orthogonal iteration makes newer ones.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from fishleg_jax import _random
from fishleg_jax.inverse.factors import Factor, Frame

product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def ranks(factor: Factor) -> tuple[int, int]:
    """Number of eigenvectors of each axis."""
    n, m = factor.axes
    return min(factor.rank, n), min(factor.rank, m)


def numbers(factor: Factor, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Number of directions behind every row, and behind every column, of the spectrum."""
    rows, columns = (
        jnp.ones(r + 1, dtype).at[-1].set(n - r)
        for n, r in zip(factor.axes, ranks(factor), strict=True)
    )
    return rows, columns


def trace(factor: Factor, frame: Frame) -> jax.Array:
    """Trace of the Fisher that a frame represents."""
    rows, columns = numbers(factor, frame.spectrum.dtype)
    return product(rows, product(frame.spectrum, columns))


def empty_frame(factor: Factor, dtype: jnp.dtype) -> Frame:
    """Initial frame, of incoherent orthonormal vectors, for which Q is `I/γ`."""
    vectors = tuple(
        _incoherent(jax.random.key(i), *size, jnp.dtype(dtype))
        for i, size in enumerate(zip(factor.axes, ranks(factor), strict=True))
    )
    spectrum = jnp.zeros([r + 1 for r in ranks(factor)], dtype)
    return Frame(vectors=vectors, values=(None, None), spectrum=spectrum)


@partial(jax.jit, static_argnames=("n", "rank", "dtype"))
def _incoherent(key: jax.Array, n: int, rank: int, dtype: jnp.dtype) -> jax.Array:
    """Cosines with random signs: orthonormal columns, without a decomposition to compile."""
    i, k = jnp.arange(n, dtype=jnp.uint32)[:, None], jnp.arange(rank, dtype=jnp.uint32)
    angle = ((2 * i + 1) * k % (4 * n)).astype(dtype) * (math.pi / (2 * n))
    norm = jnp.where(k == 0, n, n / 2).astype(dtype) ** -0.5
    return _random.signs(key, (n,), dtype)[:, None] * norm * jnp.cos(angle)


def zero_moments(factor: Factor, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Initial products of moments and eigenvectors, all zero."""
    sizes = zip(factor.axes, ranks(factor), strict=True)
    return tuple(jnp.zeros(size, dtype) for size in sizes)


def mean_moments(factor: Factor, frame: Frame, samples: jax.Array) -> tuple[jax.Array, ...]:
    """Mean of `M Mᵀ V` and `Mᵀ M W` over samples M along a leading axis."""
    v, w = frame.vectors
    m = samples.reshape(len(samples), *factor.axes)
    return product(m, product(m.mT, v)).mean(0), product(m.mT, product(m, w)).mean(0)


def mean_spectrum(factor: Factor, frame: Frame, samples: jax.Array) -> jax.Array:
    """Mean squares of samples, along a leading axis, in the parts of the space."""
    v, w = frame.vectors
    m = samples.reshape(len(samples), *factor.axes)
    left, right = product(v.T, m), product(m, w)
    inside = jnp.mean(product(left, w) ** 2, axis=0)
    totals = [jnp.mean(jnp.sum(x**2, axis=axis), axis=0) for x, axis in ((left, 2), (right, 1))]
    return _means(factor, inside, *totals, jnp.sum(m**2) / len(m))


def _means(
    factor: Factor, inside: jax.Array, rows: jax.Array, columns: jax.Array, total: jax.Array
) -> jax.Array:
    """Spectrum from sums of squares: inside of both, in each `v_i`, in each `w_j`, of all."""
    rest_of_rows = jnp.maximum(rows - inside.sum(1), 0)
    rest_of_columns = jnp.maximum(columns - inside.sum(0), 0)
    rest = total - inside.sum() - rest_of_rows.sum() - rest_of_columns.sum()
    sums = jnp.block(
        [
            [inside, rest_of_rows[:, None]],
            [rest_of_columns[None], jnp.maximum(rest, 0)[None, None]],
        ]
    )
    number = [jnp.maximum(x, 1) for x in numbers(factor, sums.dtype)]
    return sums / number[0][:, None] / number[1]


def turn(
    factor: Factor, frame: Frame, moments: tuple[jax.Array, ...]
) -> tuple[Frame, tuple[jax.Array, ...]]:
    """Frame after a step of the orthogonal iteration, and the moments and spectrum in it."""
    pairs = [_iterated(v, z) for v, z in zip(frame.vectors, moments, strict=True)]
    vectors = tuple(v for v, _ in pairs)
    # the spectrum is the mean there of the Fisher that the old frame represents
    new = [_shares(v, old) for v, old in zip(vectors, frame.vectors, strict=True)]
    spectrum = frame.spectrum
    down, across = numbers(factor, spectrum.dtype)
    inside = product(product(new[0], spectrum), new[1].T)
    rows = product(new[0], product(spectrum, across))
    columns = product(new[1], product(spectrum.T, down))
    spectrum = _means(factor, inside, rows, columns, trace(factor, frame))
    return Frame(vectors, frame.values, spectrum), tuple(z for _, z in pairs)


def _shares(new: jax.Array, old: jax.Array) -> jax.Array:
    """Squared coordinates of new directions in the old ones, and in the rest of the space."""
    squares = product(new.T, old) ** 2
    return jnp.concatenate([squares, jnp.maximum(1 - squares.sum(1), 0)[:, None]], axis=1)


def _iterated(v: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors after one orthogonal iteration and the products with them."""
    q, _ = jnp.linalg.qr(z)
    z = product(z, product(v.T, q))  # A q, of the A that is zero outside v
    small = product(q.T, z)
    _, turn = jnp.linalg.eigh((small + small.T) / 2)
    return product(q, turn), product(z, turn)


def multiply(factor: Factor, frame: Frame, damping: jax.Array, vector: jax.Array) -> jax.Array:
    """Product `Q v` for one leaf, of the vector's shape."""
    v, w = frame.vectors
    x = vector.reshape(factor.axes)
    e = 1 / (frame.spectrum + damping)
    inside, rows, columns, rest = e[:-1, :-1], e[:-1, -1], e[-1, :-1], e[-1, -1]
    left, right = product(v.T, x), product(x, w)
    core = product(left, w) * (inside - rows[:, None] - columns + rest)
    # one product of v beside the right part with the left part above wᵀ
    top = (rows - rest)[:, None] * left + product(core, w.T)
    beside = jnp.concatenate([v, right * (columns - rest)], axis=1)
    return (rest * x + product(beside, jnp.concatenate([top, w.T]))).reshape(vector.shape)


def diagonal_of(factor: Factor, frame: Frame, eigenvalues: jax.Array) -> jax.Array:
    """Diagonal of the matrix with these eigenvalues, of shape `axes`."""
    parts = []
    for v, n in zip(frame.vectors, factor.axes, strict=True):
        squares = v**2
        rest = jnp.maximum(1 - squares.sum(1), 0)[:, None]
        parts.append(jnp.concatenate([squares, rest], axis=1) if v.shape[1] < n else squares)
    r, s = (part.shape[1] for part in parts)
    return product(product(parts[0], eigenvalues[:r, :s]), parts[1].T)
