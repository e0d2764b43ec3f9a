"""Layers as blocks of weights with their Fisher, and networks with all layers quantised."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.arena import layer_inputs
from experiments.data import datasets
from experiments.models.specs import Spec
from experiments.quantise.solving import STEPS, Block, rounded
from experiments.running import results

DAMPING = 0.01  # of the mean of the second moment's diagonal
SMALL = 12  # weights of a small block: few enough to try all levels, and more than rounding solves


def layers_of(spec: Spec, params: Any, batches: Sequence[tuple]) -> dict[str, tuple]:
    """Weights `(outputs, columns)` and Fisher `(columns, columns)` of each layer but the last."""
    found = {}
    for path in layer_inputs.order(spec, params, batches[0])[:-1]:
        kernel = layer_inputs.leaf(params, path)["kernel"]
        moments = layer_inputs.second_moments(spec, params, batches, path)
        if moments.shape[:2] != (1, 1):
            continue  # stacked or grouped layers
        fisher = np.array(moments[0, 0], np.float64) / sum(len(batch[0]) for batch in batches)
        fisher += DAMPING * np.mean(np.diagonal(fisher)) * np.eye(len(fisher))
        found[path] = np.asarray(layer_inputs.as_matrices(kernel, 1)[0]), fisher.astype(np.float32)
    return found


def blocks_of(
    layers: Mapping[str, tuple], count: int, sparsity: float, seed: int
) -> dict[str, list[Block]]:
    """Small blocks and whole rows of random layers.

    Args:
        layers: Weights and Fisher by layer, see `layers_of`.
        count: Number of blocks of each size.
        sparsity: Share of zeros in a row; half of a small block is kept.
        seed: Seed of the choice of rows.

    Returns:
        Blocks by the name of their size.  A small one has the weights of a row with the largest
        scores `w²F_ii`; what its other weights do stays as it is.
    """
    rng = np.random.default_rng(seed)
    small, whole = [], []
    for _ in range(count):
        weights, fisher = list(layers.values())[rng.integers(len(layers))]
        row = weights[rng.integers(len(weights))]
        few = np.sort(np.argsort(-(row**2) * np.diagonal(fisher), kind="stable")[:SMALL])
        small.append(Block(row[few], fisher[np.ix_(few, few)], SMALL // 2))
        whole.append(Block(row, fisher, max(round((1 - sparsity) * len(row)), 1)))
    return {f"{SMALL} weights": small, "rows": whole}


def quantised(
    weights: np.ndarray, fisher: np.ndarray, sparsity: float, bits: int, moves: bool
) -> jax.Array:
    """All rows of a layer, each with the same number of zeros."""
    keep = max(round((1 - sparsity) * weights.shape[1]), 1)
    steps = STEPS if moves else 1
    row = jax.jit(
        jax.vmap(
            lambda w: flj.selection.quantise(
                w, jnp.asarray(fisher), keep=keep, bits=bits, steps=steps
            )
        )
    )
    found = row(jnp.asarray(weights))
    if moves:
        return found.weights
    return jnp.stack(
        [
            np.where(w < 0, -1, 1) * s * rounded(Block(w, fisher, keep), float(s), 2**bits)
            for w, s in zip(weights, np.asarray(found.scale), strict=True)
        ]
    ).astype(jnp.float32)


def measured(
    how: str,
    spec: Spec,
    dense: results.Dense,
    layers: Mapping[str, tuple],
    data: datasets.Data,
    *,
    sparsity: float,
    bits: int,
) -> dict[str, float]:
    """Accuracy and loss of a network with all layers quantised.

    Args:
        how: `rounding` or `moves`; `dense` for the network as it is.
        spec: The model.
        dense: The network before.
        layers: Weights and Fisher by layer, see `layers_of`.
        data: The data set.
        sparsity: Share of zeros in every row.
        bits: Bits of a kept weight besides its sign.
    """
    if how == "dense":
        return {"accuracy": dense.accuracy, "loss": dense.loss}
    params = jax.tree.map(lambda x: x, dense.params)
    for path, (weights, fisher) in layers.items():
        found = quantised(weights, fisher, sparsity, bits, how == "moves")
        layer = layer_inputs.leaf(params, path)
        layer["kernel"] = layer_inputs.as_kernel(found[None], layer["kernel"].shape)
    accuracy, loss = results.measure(spec, params, data.test, dense.constants)
    return {"accuracy": accuracy, "loss": loss}
