"""Forms of a decomposition: a kernel as two or three smaller ones, in the metric of its Fisher.

A kernel K of shape (spatial axes, in, out) is folded to a matrix M, or for Tucker-2 to a tensor of
(spatial, in, out).  With the Fisher `F = A ⊗ B` of M's rows and columns the rise of the loss is
`½ tr(Δᵀ A Δ B) = ½ ‖A^½ Δ B^½‖²`: the best Δ of a rank cuts the singular values of `A^½ M B^½`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fishleg_jax.low_rank.running import owners
from fishleg_jax.low_rank.uses import Use

CONVOLUTIONS = ("channel", "spatial", "tucker2")


class Options(NamedTuple):
    """Decompositions of one kernel to choose from, in float64.

    Attributes:
        ranks: Ranks of every option, of shape (options, 1) or (options, 2).
        loss: Predicted rise of the loss of every option: nats per example, or half the squared
            error with an identity for the metric.
        weights: Number of weights of its factors.
        flops: Operations of its layers per example.
        whole: Loss of leaving the kernel out altogether, which makes other losses relative.
        dense: Number of weights and operations of the kernel itself.
        factors: Function from ranks to the kernels of the layers, by name.
    """

    ranks: np.ndarray
    loss: np.ndarray
    weights: np.ndarray
    flops: np.ndarray
    whole: float
    dense: tuple[float, float]
    factors: Callable[[tuple[int, ...]], dict[str, np.ndarray]]


class Root(NamedTuple):
    """Square root of a metric, and its inverse."""

    root: np.ndarray
    inverse: np.ndarray


def root_of(moment: np.ndarray | None, size: int, damping: float) -> Root:
    """Square root of a damped second moment; the identity without one.

    Args:
        moment: Symmetric matrix of shape (size, size); None for the identity.
        size: Number of rows.
        damping: Number added to the eigenvalues, as a share of their mean.
    """
    if moment is None:
        return Root(np.eye(size), np.eye(size))
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    mean = max(float(values.mean()), np.finfo(np.float32).tiny)
    values = np.sqrt(np.maximum(values, 0) + damping * mean)
    return Root((vectors * values) @ vectors.T, (vectors / values) @ vectors.T)


def fold(form: str, kernel: Any) -> Any:
    """Kernel (spatial axes, in, out) as the array whose axes carry the metrics of the form."""
    *spatial, inputs, outputs = kernel.shape
    if form == "spatial":
        height, width = spatial
        moved = kernel.transpose(0, 2, 1, 3)
        return moved.reshape(height * inputs, width * outputs)
    if form == "tucker2":
        return kernel.reshape(-1, inputs, outputs)
    return kernel.reshape(-1, outputs)


def options_of(
    form: str, kernel: np.ndarray, use: Use, moments: tuple | None, damping: float
) -> Options:
    """All decompositions of a kernel that have fewer weights than itself.

    Args:
        form: `svd`, `channel`, `spatial` or `tucker2`.
        kernel: Array of shape (spatial axes, in, out).
        use: How the network uses it.
        moments: Second moments of the folded gradient along its last two axes; None for the
            identity, which makes this a plain decomposition.
        damping: See `root_of`.
    """
    folded = fold(form, np.asarray(kernel, np.float64))
    first, last = folded.shape[-2:]
    left, right = moments if moments is not None else (None, None)
    roots = root_of(left, first, damping), root_of(right, last, damping)
    make = _tucker if form == "tucker2" else _matrix
    return make(form, kernel.shape, folded, roots, use)


def _matrix(form: str, shape: tuple, folded: np.ndarray, roots: tuple, use: Use) -> Options:
    (a, a_inverse), (b, b_inverse) = roots
    u, s, vt = np.linalg.svd(a @ folded @ b, full_matrices=False)
    ranks = np.arange(1, len(s) + 1)
    rest = np.cumsum((s**2)[::-1])[::-1] / 2
    loss = np.append(rest[1:], 0.0)

    def factors(ranks: tuple[int, ...]) -> dict[str, np.ndarray]:
        (r,) = ranks
        left = a_inverse @ u[:, :r] * np.sqrt(s[:r])
        right = np.sqrt(s[:r])[:, None] * (vt[:r] @ b_inverse)
        # equal norms, which the metric does not give
        sizes = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
        scale = np.sqrt(np.divide(sizes[1], sizes[0], out=np.ones(r), where=sizes[0] > 0))
        scale = np.where(scale > 0, scale, 1)
        left, right = left * scale, right / scale[:, None]
        *spatial, inputs, outputs = shape
        if form == "spatial":
            height, width = spatial
            left = left.reshape(height, 1, inputs, r)
            right = right.reshape(r, width, outputs).transpose(1, 0, 2)[None]
        else:
            left = left.reshape(*spatial, inputs, r)
            right = right.reshape(*[1] * len(spatial), r, outputs)
        return {"left": left, "right": right}

    return _options(shape, use, ranks[:, None], loss, float(rest[0]), factors, _pair(form, shape))


def _pair(form: str, shape: tuple) -> Callable[[tuple], list[tuple]]:
    """Shapes of the two factors by rank."""
    *spatial, inputs, outputs = shape
    if form == "spatial":
        height, width = spatial
        return lambda r: [(height, 1, inputs, r[0]), (1, width, r[0], outputs)]
    return lambda r: [(*spatial, inputs, r[0]), (*[1] * len(spatial), r[0], outputs)]


def _tucker(form: str, shape: tuple, folded: np.ndarray, roots: tuple, use: Use) -> Options:
    del form
    (a, a_inverse), (b, b_inverse) = roots
    whitened = np.einsum("ij,sjk,kl->sil", a, folded, b, optimize=True)
    u = np.linalg.svd(np.concatenate(list(whitened), axis=1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([x.T for x in whitened], axis=1), full_matrices=False)[0]
    core = np.einsum("ij,sik,kl->sjl", u, whitened, v, optimize=True)
    kept = np.cumsum(np.cumsum((core**2).sum(axis=0), axis=0), axis=1) / 2
    whole = float((whitened**2).sum() / 2)
    grid = np.stack(np.meshgrid(*map(np.arange, kept.shape), indexing="ij"), -1).reshape(-1, 2)
    *spatial, inputs, outputs = shape
    ones = [1] * len(spatial)

    def factors(ranks: tuple[int, ...]) -> dict[str, np.ndarray]:
        r, t = ranks
        return {
            "first": (a_inverse @ u[:, :r]).reshape(*ones, inputs, r),
            "core": core[:, :r, :t].reshape(*spatial, r, t),
            "last": (v[:, :t].T @ b_inverse).reshape(*ones, t, outputs),
        }

    def shapes(ranks):
        r, t = ranks
        return [(*ones, inputs, r), (*spatial, r, t), (*ones, t, outputs)]

    loss = np.maximum(whole - kept.reshape(-1), 0)
    return _options(shape, use, grid + 1, loss, whole, factors, shapes)


def _options(
    shape: tuple,
    use: Use,
    ranks: np.ndarray,
    loss: np.ndarray,
    whole: float,
    factors: Callable,
    shapes: Callable,
) -> Options:
    """Counts weights and operations of all ranks: both are linear in the entries of each factor."""
    columns = [np.asarray(r) for r in ranks.T]
    own = shapes(columns)
    sizes = [math.prod(x) for x in own]  # arrays, as ranks are
    # a factor's layer gives out images that have shrunk along its axes and those before
    example = shapes([2] * len(columns))
    moving = owners(example, range(len(use.before)))
    positions = [
        math.prod(use.after[k] if moving[k] <= j else use.before[k] for k in range(len(use.before)))
        for j in range(len(own))
    ]
    flops = sum(2 * use.calls * n * size for n, size in zip(positions, sizes, strict=True))
    dense = math.prod(shape)
    operations = 2 * use.calls * math.prod(use.after) * dense
    return Options(
        ranks,
        loss,
        np.asarray(sum(sizes), np.float64),
        np.asarray(flops, np.float64),
        whole,
        (float(dense), float(operations)),
        factors,
    )
