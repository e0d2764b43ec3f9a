"""WoodFisher's inverse of a block, stored as a square root: `F_γ⁻¹ = A Aᵀ`.

For new gradients B (rows, over √m), with `V = B A` and the Cholesky factor `L Lᵀ = I + V Vᵀ`:

    F'⁻¹ = A (I + Vᵀ V)⁻¹ Aᵀ = A' A'ᵀ,    A' = A − A Vᵀ L⁻ᵀ (L + I)⁻¹ V

(Andrews, A square root formulation of the Kalman covariance equations, 1968.)  The textbook
recursion subtracts from `F⁻¹`, whose entries start at 1/γ: at γ = 1e-7 float32 loses all digits of
the remainder, and the result may not be positive.  The square root starts at γ^-½, loses half as
many digits, and gives a positive semi-definite inverse despite rounding.
"""

import jax
import jax.numpy as jnp

from fishleg_jax.inverse._kronecker.algebra import HIGHEST

# Few rows relative to the size of a block give a well-conditioned I + V Vᵀ.  In blocks of 20, at
# eigenvalues from 0 to 1 and γ = 1e-7, one row at a time is accurate to 2e-5 and 16 to 6e-3.
ROWS_AT_ONCE = 16
SIZE_OVER_ROWS = 16


def start(blocks: int, size: int, damping: jax.Array) -> jax.Array:
    """Initial A without data, (blocks, size, size)."""
    eye = jnp.eye(size, dtype=damping.dtype) * jax.lax.rsqrt(damping)
    return jnp.tile(eye, (blocks, 1, 1))


def extend(root: jax.Array, rows: jax.Array) -> jax.Array:
    """Assimilates gradients into A.

    Args:
        root: Square root A, (blocks, size, size).
        rows: Gradients, (blocks, rows, size), divided by the square root of their total number m.

    Returns:
        Array like `root`, for 6 · rows · size² operations per block.
    """
    blocks, number, size = rows.shape
    at_once = min(number, max(size // SIZE_OVER_ROWS, 1), ROWS_AT_ONCE)
    parts = -(-number // at_once)
    rows = jnp.pad(rows, [(0, 0), (0, parts * at_once - number), (0, 0)])
    rows = jnp.moveaxis(rows.reshape(blocks, parts, at_once, size), 1, 0)
    return jax.lax.scan(lambda a, part: (_extend(a, part), None), root, rows)[0]


def _extend(root: jax.Array, rows: jax.Array) -> jax.Array:
    v = jnp.matmul(rows, root, precision=HIGHEST)
    gram = jnp.matmul(v, v.mT, precision=HIGHEST)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)

    def by_cholesky(lower):
        inner = jax.scipy.linalg.solve_triangular(lower + eye, eye, lower=True)
        return jax.scipy.linalg.solve_triangular(lower, inner, lower=True, trans=1)

    def by_eigenvalues(lower):
        # for the symmetric root: (1 − (1 + s)^-½) / s, without the cancellation
        del lower
        values, vectors = jax.lax.map(jnp.linalg.eigh, gram)  # one by one: see `frames.decompose`
        inverse_root = jax.lax.rsqrt(1 + jnp.maximum(values, 0))
        weights = inverse_root**2 / (1 + inverse_root)
        return jnp.matmul(vectors * weights[:, None, :], vectors.mT, precision=HIGHEST)

    lower = jnp.linalg.cholesky(gram + eye)
    # for nearly dependent gradients far above the damping, Cholesky fails in this precision
    small = jax.lax.cond(jnp.isfinite(lower).all(), by_cholesky, by_eigenvalues, lower)
    left = jnp.matmul(jnp.matmul(root, v.mT, precision=HIGHEST), small, precision=HIGHEST)
    return root - jnp.matmul(left, v, precision=HIGHEST)


def multiply(root: jax.Array, vector: jax.Array) -> jax.Array:
    """Product `A Aᵀ v` for vectors (blocks, size)."""
    inner = jnp.einsum("bij,bi->bj", root, vector, precision=HIGHEST)
    return jnp.einsum("bij,bj->bi", root, inner, precision=HIGHEST)


def diagonal(root: jax.Array) -> jax.Array:
    """Diagonal of `A Aᵀ`, (blocks, size)."""
    return jnp.sum(root**2, axis=2)
