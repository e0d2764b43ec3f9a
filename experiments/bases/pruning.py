"""Prunes a network in one basis: in one shot, or while it is trained on."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fishleg_jax as flj
from experiments.bases.networks import prunable_in
from experiments.data import datasets
from experiments.models import recalibration
from experiments.models.cases import curvature_batches
from experiments.models.specs import Spec, as_batch
from experiments.models.training import loss_of
from experiments.running import processes, results

STAGES = 4  # of one-shot pruning
RATE = 1e-3  # of Adam while a network is trained on
REGROW = 0.1  # share of the pruned coefficients that may come back at a mask update
BASES = ("space", "dct", "dct_bands")
METHODS = ("magnitude", "fishleg")
MODES = ("one_shot", "dynamic")


def steep(x: Any) -> Any:
    """Rate of compression by relative frequency: the highest loses at twice the magnitude."""
    return 4.0**x


class Changed(NamedTuple):
    """A network in a basis: the basis, the model of coefficients, and scores by method."""

    basis: flj.bases.Basis
    model: flj.Model
    saliency: dict[str, Any]


@lru_cache(maxsize=32)  # so that seeds and densities share what is compiled
def changed(spec: Spec, basis_name: str) -> Changed:
    """A network with coefficients for parameters.

    Args:
        spec: the network.
        basis_name: a name in `BASES`.
    """
    basis = flj.bases.identity() if basis_name == "space" else flj.bases.dct(prunable_in(spec.name))
    names = {"magnitude": "magnitude", "fishleg": "obs"}
    if basis_name == "dct_bands":
        names = {method: flj.bases.by_band(basis, steep, name) for method, name in names.items()}
    return Changed(basis, flj.bases.in_basis(spec.model, basis), names)


def pruned(
    spec: Spec,
    dense: results.Dense,
    split: datasets.Data,
    *,
    mode: str,
    basis_name: str,
    method: str,
    density: float,
    examples: int,
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Prunes to one density and evaluates the weights back in space.

    Args:
        spec: the model.
        dense: the trained network.
        split: the data set.
        mode: `one_shot`, or `dynamic` for pruning while it is trained on, with regrowth.
        basis_name: `space`, `dct`, or `dct_bands` for scores divided by `steep`.
        method: `magnitude` or `fishleg`.
        density: share of the convolutions' coefficients that is kept.
        examples: training examples for the curvature of one-shot pruning.
        epochs: how long the network is trained on.
        seed: for the choice and order of examples.

    Returns:
        Accuracy, loss, share kept and seconds.
    """
    begin = time.perf_counter()
    basis, model, saliency = changed(spec, basis_name)
    coefficients = basis.coefficients(dense.params)
    prunable = prunable_in(spec.name)
    if mode == "one_shot":
        coefficients = _in_one_shot(
            *(spec, model, saliency[method], coefficients, split, dense),
            *(method, density, examples, seed),
        )
        constants = dense.constants
        if constants:
            constants = recalibration.recalibrated(
                spec, basis.weights(coefficients), constants, split.train, seed
            )
    else:
        coefficients, constants = _while_trained(
            spec, basis_name, coefficients, split, dense, method, density, epochs, seed
        )
    seconds = time.perf_counter() - begin
    accuracy, loss = results.measure(spec, basis.weights(coefficients), split.test, constants)
    kept = 1 - flj.sparsity(coefficients, prunable)
    return {"accuracy": accuracy, "loss": loss, "kept": kept, "seconds": seconds}


def _in_one_shot(
    spec: Spec,
    model: flj.Model,
    saliency: Any,
    coefficients: Any,
    split: datasets.Data,
    dense: results.Dense,
    method: str,
    density: float,
    examples: int,
    seed: int,
) -> Any:
    batches = curvature_batches(
        split.train, dense.constants, examples=examples, batch_size=spec.batch, seed=seed
    )
    fishleg = method == "fishleg"
    return flj.prune_one_shot(
        model,
        coefficients,
        flj.inverse.fishleg(model) if fishleg else flj.inverse.identity(),
        batches if fishleg else batches[:1],
        sparsity=round(1 - density, 6),
        stages=STAGES if fishleg else 1,
        compensation=flj.compensation.group() if fishleg else flj.compensation.none(),
        key=jax.random.key(seed),
        prunable=prunable_in(spec.name),
        saliency=saliency,
    ).params


def _while_trained(
    spec: Spec,
    basis_name: str,
    coefficients: Any,
    split: datasets.Data,
    dense: results.Dense,
    method: str,
    density: float,
    epochs: int,
    seed: int,
) -> tuple[Any, Any]:
    batch = min(spec.train_batch, len(split.train[0]))
    steps = len(split.train[0]) // batch
    tx, step = _training(spec, basis_name, method, density, epochs * steps)
    constants, state = dense.constants, tx.init(coefficients)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        chosen = order.permutation(len(split.train[0]))[: steps * batch].reshape(steps, batch)
        for rows in chosen:
            data = processes.read(split.train, rows)
            coefficients, constants, state = step(coefficients, constants, state, *data)
    return coefficients, constants


@lru_cache(maxsize=4)  # seeds share a compilation
def _training(
    spec: Spec, basis_name: str, method: str, density: float, total: int
) -> tuple[Any, Callable]:
    """The optimiser with pruning and regrowth behind it, and a compiled step."""
    basis, model, saliency = changed(spec, basis_name)
    every = max(total // 20, 1)
    schedule = flj.schedules.cubic(round(1 - density, 6), begin=every, end=3 * total // 4)
    common = {
        "mask_every": every,
        "aux_every": every,
        "regrow": partial(_share, until=9 * total // 10),
        "prunable": prunable_in(spec.name),
        "saliency": saliency[method],
    }
    if method == "fishleg":
        pruning = flj.fishleg_prune(model, schedule, **common)
    else:
        none = flj.compensation.none()
        pruning = flj.gradual_prune(
            flj.inverse.identity(), schedule, model=model, compensation=none, **common
        )
    tx = optax.chain(optax.adam(optax.cosine_decay_schedule(RATE, total)), pruning)
    loss = loss_of(spec)

    @jax.jit
    def step(coefficients, constants, state, inputs, targets):
        def loss_in_basis(c):
            return loss(basis.weights(c), constants, inputs, targets)

        grads, new = jax.grad(loss_in_basis, has_aux=True)(coefficients)
        batch = as_batch(inputs, targets, constants)
        updates, state = tx.update(grads, state, coefficients, batch=batch)
        return optax.apply_updates(coefficients, updates), new, state

    return tx, step


def _share(step: jax.Array, until: int) -> jax.Array:
    """Share of coefficients that may come back, until the training's last tenth."""
    return jnp.where(step < until, REGROW, 0.0)
