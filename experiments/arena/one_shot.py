"""One cell of the arena in one shot: a method's default call at every sparsity."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import fishleg_jax as flj
from experiments.arena import layerwise
from experiments.arena.contestants import ARGUMENTS, make_estimator, prunable
from experiments.arena.networks import Contestant
from experiments.models.cases import curvature_batches

BATCH = 64  # examples; of the curvature and of a training step


def prune(
    method: str, network: Contestant, sparsities: Sequence[float], *, examples: int, seed: int
) -> Iterator[tuple[float, Any, Any, dict[str, Any]]]:
    """Prunes a network with one method to every sparsity.

    Args:
        method: a name in `ARGUMENTS` or in `layerwise.METHODS`.
        network: the trained network.
        sparsities: the sparsities, each from the dense network.
        examples: number of training examples, the same ones for every method.
        seed: for their choice, and for the method's random numbers.

    Yields:
        The sparsity, the pruned parameters, the constants, and fields for `results.json`.
    """
    examples = min(examples, len(network.split.train[0]))
    batches = curvature_batches(
        network.split.train, network.constants, examples=examples, batch_size=BATCH, seed=seed
    )
    if method in layerwise.METHODS:
        yield from _layer_by_layer(method, network, batches, sparsities)
        return
    spec = network.spec
    estimator = make_estimator(method, spec, len(batches) * BATCH)
    arguments = {**ARGUMENTS[method].one_shot, **prunable(spec)}
    for sparsity in sparsities:
        begin, cpu = time.perf_counter(), time.process_time()
        result = flj.prune_one_shot(
            spec.model,
            network.params,
            estimator,
            batches,
            sparsity=sparsity,
            key=jax.random.key(seed),
            **arguments,
        )
        jax.block_until_ready(result.params)
        constants = network.constants if result.constants is None else result.constants
        yield (
            sparsity,
            result.params,
            constants,
            {
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": time.process_time() - cpu,
                "stages": len(result.stages),
                "stopped": result.stopped,
            },
        )


def _layer_by_layer(
    method: str, network: Contestant, batches: list[tuple], sparsities: Sequence[float]
) -> Iterator[tuple[float, Any, Any, dict[str, Any]]]:
    for sparsity in sparsities:
        begin, cpu = time.perf_counter(), time.process_time()
        params = layerwise.prune(
            layerwise.METHODS[method], network.spec, network.params, batches, sparsity
        )
        jax.block_until_ready(params)
        seconds = time.perf_counter() - begin, time.process_time() - cpu
        fields = dict(zip(("seconds", "cpu_seconds"), seconds, strict=True))
        yield sparsity, params, network.constants, fields
