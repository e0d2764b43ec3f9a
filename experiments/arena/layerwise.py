"""Wanda and SparseGPT: each layer on its own, by what it sees, from the papers' equations.

References:
    Sun et al., A simple and effective pruning approach for large language models, ICLR 2024,
    equation 1; Frantar & Alistarh, SparseGPT, ICML 2023, algorithm 1.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.arena import layer_inputs
from experiments.arena.layer_inputs import as_kernel, as_matrices, leaf
from experiments.models.specs import Spec

BLOCK = 128  # columns of SparseGPT for which a mask is chosen at a time
DAMPING = 0.01  # of SparseGPT, of the mean of the second moment's diagonal

# from weights (groups, rows, columns), second moments (groups, columns, columns) and the number of
# weights to prune, to pruned weights
PruneLayer = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def wanda(weights: np.ndarray, moments: np.ndarray, count: int) -> np.ndarray:
    """Prunes the lowest `|W_ij| ‖X_j‖₂` of every row, and changes no other weight.

    Rows lose equally many weights; where `count` is no multiple of their number, some lose one
    more, those in which it scores lowest.

    Args:
        weights: a row for each output, `(groups, rows, columns)`.
        moments: `Σ x xᵀ`, `(groups, columns, columns)`.
        count: number of weights to prune.
    """
    norms = np.sqrt(np.diagonal(moments, axis1=1, axis2=2))
    scores = np.abs(weights) * norms[:, None]
    places = scores.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    lowest = np.lexsort((scores.ravel(), places.ravel()))[:count]
    pruned = weights.copy()
    pruned.reshape(-1)[lowest] = 0
    return pruned


def sparse_gpt(weights: np.ndarray, moments: np.ndarray, count: int) -> np.ndarray:
    """Prunes column by column, and lets the columns behind make up for each.

    A mask is chosen for `BLOCK` columns at a time by `w² / [H⁻¹]_jj`, with H the damped second
    moment of the columns from j on.

    Args:
        weights: a row for each output, `(groups, rows, columns)`.
        moments: `Σ x xᵀ`, `(groups, columns, columns)`.
        count: number of weights to prune.
    """
    groups, rows, columns = weights.shape
    # as equal shares of all blocks as whole numbers allow
    ends = [min(begin + BLOCK, columns) for begin in range(0, columns, BLOCK)]
    done = [group * rows * columns + rows * end for group in range(groups) for end in ends]
    counts = np.diff([0, *(count * part // weights.size for part in done)])
    counts = counts.reshape(groups, len(ends))
    parts = zip(weights, moments, counts, strict=True)
    return np.stack([_sparse_gpt(*part) for part in parts])


def _sparse_gpt(weights: np.ndarray, moment: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    weights, moment = weights.astype(float), moment.astype(float)
    diagonal = np.einsum("ii->i", moment)  # a view
    # a column that sees nothing but zeros is pruned at no cost
    dead = diagonal == 0
    diagonal[dead] = 1
    weights[:, dead] = 0
    diagonal += DAMPING * diagonal.mean()
    # H⁻¹ = UᵀU: row j of U has the inverse for the columns from j on, U_jj U_j
    upper = np.linalg.cholesky(np.linalg.inv(moment)).T
    for block, count in enumerate(counts):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, len(moment))
        scores = (weights[:, begin:end] / np.diag(upper)[begin:end]) ** 2
        mask = np.zeros(scores.shape, bool)
        mask.reshape(-1)[scores.ravel().argsort(kind="stable")[:count]] = True
        for j in range(begin, end):
            error = np.where(mask[:, j - begin], weights[:, j] / upper[j, j], 0)
            weights[:, j:] -= np.outer(error, upper[j, j:])
            weights[mask[:, j - begin], j] = 0  # no rounding is left of them
    return weights


METHODS: dict[str, PruneLayer] = {"wanda": wanda, "sparsegpt": sparse_gpt}


def prunable_layers(spec: Spec, params: Any, batch: tuple) -> list[str]:
    """The layers whose kernels the library prunes by default, in the order of their calls."""
    scores = jax.tree.map(jnp.abs, params)
    masks = flj.make_masks(scores, 0.5, scope="layer", prunable=spec.prunable)
    paths = layer_inputs.order(spec, params, batch)
    return [path for path in paths if not leaf(masks, path)["kernel"].all()]


def prune(
    prune_layer: PruneLayer, spec: Spec, params: Any, batches: Sequence[tuple], sparsity: float
) -> Any:
    """Prunes all layers to the same sparsity, one after the other.

    A layer sees what the layers before it, pruned already, make of the inputs.

    Args:
        prune_layer: one of `METHODS`.
        spec: the model.
        params: its parameters.
        batches: training data as the library wants them; labels are not used.
        sparsity: fraction of the weights of every layer to prune.

    Returns:
        The pruned parameters.
    """
    params = jax.tree.map(lambda x: x, params)  # new dicts, into which pruned kernels are put
    for path, number in _in_turn(params, prunable_layers(spec, params, batches[0])):
        moments = layer_inputs.second_moments(spec, params, batches, path)[number]
        own = leaf(params, path)
        stacked = layer_inputs.is_stacked(own["kernel"])
        kernel = np.asarray(own["kernel"][number] if stacked else own["kernel"])
        count = math.floor(round(sparsity * kernel.size, 6))
        matrices = as_matrices(kernel, len(moments))
        pruned = prune_layer(matrices, np.asarray(moments), count).astype(kernel.dtype)
        new = jnp.asarray(as_kernel(pruned, kernel.shape))
        own["kernel"] = own["kernel"].at[number].set(new) if stacked else new
    return params


def _in_turn(params: Any, paths: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Layers and their numbers in a stack: of scanned ones, all parts of one before the next."""
    counts = {path: leaf(params, path)["kernel"] for path in paths}
    counts = {p: len(k) if layer_inputs.is_stacked(k) else 1 for p, k in counts.items()}
    for layers, own in itertools.groupby(paths, counts.get):
        own = list(own)
        yield from ((path, number) for number in range(layers) for path in own)
