"""An orthonormal basis of gradients that lie in parts, none of which is put together."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fishleg_jax import _mesh
from fishleg_jax.inverse._algebra import HIGHEST

ROWS_AT_ONCE = 50  # QR factorisations of wider blocks cost more an entry


def orthonormal(
    rows: Sequence[jax.Array], count: jax.Array, damping: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """An orthonormal basis Q of the gradients, in rows, and R with `Q nF_γ Qᵀ = Rᵀ R`.

    Block Gram-Schmidt, twice, each time with a QR factorisation inside the block: orthonormal to
    rounding whatever the gradients are, dependent or zero ones too.

    Args:
        rows: parts of the gradients, (blocks, m, size) each; all blocks together are a gradient.
        count: n.
        damping: γ.
    """
    window = rows[0].shape[1]
    at_once = min(window, ROWS_AT_ONCE)
    steps = -(-window // at_once)
    fill = (0, 0), (0, steps * at_once - window), (0, 0)
    rows = [jnp.pad(g, fill) for g in rows]
    padded, dtype = rows[0].shape[1], rows[0].dtype
    real = (jnp.arange(padded) < window).astype(dtype)

    def project(part, basis):
        pairs = list(zip(part, basis, strict=True))
        inner = sum(_matmul(p, b.mT).sum(axis=0) for p, b in pairs)
        q, r = tall_qr([(p - times(inner, b)).mT for p, b in pairs])
        return inner, [x.mT for x in q], r.T

    def add(i, carry):
        basis, coefficients = carry
        part = [jax.lax.dynamic_slice_in_dim(g, i * at_once, at_once, axis=1) for g in rows]
        first, part, scale = project(part, basis)
        second, part, turn = project(part, basis)
        inner = first + _matmul(scale, second)
        inner = jax.lax.dynamic_update_slice(inner, _matmul(scale, turn), (0, i * at_once))
        # rows that only fill up the last part would make more directions than there may be
        kept = jax.lax.dynamic_slice_in_dim(real, i * at_once, at_once)[:, None]
        basis = [
            jax.lax.dynamic_update_slice(b, p * kept, (0, i * at_once, 0))
            for b, p in zip(basis, part, strict=True)
        ]
        return basis, jax.lax.dynamic_update_slice(coefficients, inner, (i * at_once, 0))

    start = list(map(jnp.zeros_like, rows)), jnp.zeros((padded, padded), dtype)
    basis, coefficients = jax.lax.fori_loop(0, steps, add, start)
    return basis, root(coefficients, count, damping)


def root(rows: jax.Array, count: jax.Array, damping: jax.Array) -> jax.Array:
    """R with `Rᵀ R = Gᵀ G + nγI`, of gradients G in rows."""
    size = rows.shape[1]
    below = jnp.sqrt(count * damping) * jnp.eye(size, dtype=rows.dtype)
    return jnp.linalg.qr(jnp.concatenate([rows, below]), mode="r")


def times(matrix: jax.Array, blocks: jax.Array) -> jax.Array:
    """A matrix times every block; a product without a batch would copy the blocks, transposed."""
    return _matmul(jnp.broadcast_to(matrix, (len(blocks), *matrix.shape)), blocks)


def tall_qr(parts: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The QR factorisation of a tall matrix in parts (blocks, rows, columns).

    That of every block, of a device's piece of one that is spread, and of their Rs.
    """
    found = list(map(_of_blocks, parts))
    (q, r), columns = found[0], parts[0].shape[2]
    if len(found) == len(q) == 1:
        return [q], r[0]
    outer, whole = jnp.linalg.qr(jnp.concatenate([r.reshape(-1, columns) for _, r in found]))
    ends = itertools.accumulate(r.shape[0] * r.shape[1] for _, r in found)
    return [
        _matmul(q, outer[end - r.shape[0] * r.shape[1] : end].reshape(*r.shape[:2], -1))
        for (q, r), end in zip(found, ends, strict=True)
    ], whole


def _of_blocks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    names = _mesh.cutters((x.shape[1],))
    if not names:
        return _one_by_one(x)

    def piece(x):
        q, r = _one_by_one(x)
        outer, whole = _one_by_one(jax.lax.all_gather(r, names, axis=1, tiled=True))
        begin = jax.lax.axis_index(names) * r.shape[1]
        own = jax.lax.dynamic_slice_in_dim(outer, begin, r.shape[1], axis=1)
        return _matmul(q, own), whole

    cut = PartitionSpec(None, names)
    return jax.shard_map(piece, in_specs=cut, out_specs=(cut, PartitionSpec()), check_vma=False)(x)


def _one_by_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    factor = lambda block: tuple(jnp.linalg.qr(block))
    if len(x) == 1:  # a loop would copy it
        return tuple(y[None] for y in factor(x[0]))
    return jax.lax.map(factor, x)  # see `_frames.decompose`


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)
