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

SCORES = {"magnitude": "magnitude", "fishleg": "obs"}
DEFAULT = "fishleg_default"  # scores and dampings that the library chooses, in one shot
GROUP, NONE = flj.compensation.group(), flj.compensation.none()
IDENTITY = flj.inverse.identity()
RATE = 1e-3  # of Adam while a network is trained on
REPLACED = 0.1  # coefficients that may come back at a mask update, as a share of those kept
BASES = ("space", "dct", "dct_bands")
METHODS = (*SCORES, DEFAULT)
MODES = ("one_shot", "dynamic")


def steep(x: Any) -> Any:
    """Rate of compression by relative frequency: the highest loses at twice the magnitude."""
    return 4.0**x


class Changed(NamedTuple):
    """A network in a basis, with what pruning needs; made once, so that compilations are shared.

    Attributes:
        basis: the basis.
        model: the network of coefficients.
        estimator: FishLeg for it.
        saliency: scores by name of the basis and method.
    """

    basis: flj.bases.Basis
    model: flj.Model
    estimator: flj.InverseFisher
    saliency: dict[tuple[str, str], Any]


@lru_cache(maxsize=32)
def changed(spec: Spec, dct: bool) -> Changed:
    """A network with coefficients for parameters.

    Args:
        spec: the network.
        dct: whether in the DCT of its kernels; else in space.
    """
    basis = flj.bases.dct(prunable_in(spec.name)) if dct else flj.bases.identity()
    model = flj.bases.in_basis(spec.model, basis)
    saliency: dict[tuple[str, str], Any] = {}
    for method, name in SCORES.items():
        saliency["space", method] = saliency["dct", method] = name
        saliency["dct_bands", method] = flj.bases.by_band(basis, steep, name)
    return Changed(basis, model, flj.inverse.fishleg(model), saliency)


_STATES: dict[tuple, Any] = {}  # one fit serves all densities


def _fitted(
    spec: Spec, network: Changed, coefficients: Any, batches: list, seed: int, examples: int
) -> Any:
    key = spec.name, network.model, results.fingerprint(coefficients), seed, examples
    if key not in _STATES:
        _STATES.clear()
        _STATES[key] = flj.fit(network.estimator, coefficients, batches, key=jax.random.key(seed))
    return _STATES[key]


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
        method: of `METHODS`.
        density: share of the convolutions' coefficients that is kept.
        examples: training examples for the curvature of one-shot pruning.
        epochs: how long the network is trained on.
        seed: for the choice and order of examples.

    Returns:
        Accuracy, loss, share kept and seconds; with `dynamic` also the number of coefficients that
        came back, summed over the mask updates.
    """
    begin, more = time.perf_counter(), {}
    network = changed(spec, basis_name != "space")
    basis = network.basis
    coefficients = basis.coefficients(dense.params)
    prunable = prunable_in(spec.name)
    if mode == "one_shot":
        coefficients = _in_one_shot(
            *(spec, network, basis_name, coefficients, split, dense),
            *(method, density, examples, seed),
        )
        constants = dense.constants
        if constants:
            constants = recalibration.recalibrated(
                spec, basis.weights(coefficients), constants, split.train, seed
            )
    else:
        coefficients, constants, returned = _while_trained(
            spec, basis_name, coefficients, split, dense, method, density, epochs, seed
        )
        more["returned"] = returned
    seconds = time.perf_counter() - begin
    accuracy, loss = results.measure(spec, basis.weights(coefficients), split.test, constants)
    kept = 1 - flj.sparsity(coefficients, prunable)
    return {"accuracy": accuracy, "loss": loss, "kept": kept, "seconds": seconds, **more}


def _in_one_shot(
    spec: Spec,
    network: Changed,
    basis_name: str,
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
    options: dict[str, Any] = {"prunable": prunable_in(spec.name), "stages": 1}
    if method != DEFAULT:
        options["saliency"] = network.saliency[basis_name, method]
    elif basis_name == "dct_bands":
        bands = network.basis.bands(dense.params)
        costs = jax.tree.map(lambda x: steep(x / max(int(x.max()), 1)), bands)
        options["prunable"] = flj.Leaves(options["prunable"], costs=costs)
    estimator, compensation = network.estimator, GROUP
    if method == "fishleg":
        state = _fitted(spec, network, coefficients, batches, seed, examples)
        options["stages"] = flj.Stages(state=state)
    elif method == "magnitude":
        estimator, compensation, batches = IDENTITY, NONE, batches[:1]
    return flj.prune_one_shot(
        network.model,
        coefficients,
        estimator,
        batches,
        sparsity=round(1 - density, 6),
        compensation=compensation,
        **options,
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
) -> tuple[Any, Any, int]:
    """Coefficients and constants, and the number of coefficients that came back."""
    batch = min(spec.train_batch, len(split.train[0]))
    steps = len(split.train[0]) // batch
    tx, step = _training(spec, basis_name, method, density, epochs * steps)
    constants, state = dense.constants, tx.init(coefficients)
    returned = jnp.zeros((), jnp.int32)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        chosen = order.permutation(len(split.train[0]))[: steps * batch].reshape(steps, batch)
        for rows in chosen:
            data = processes.read(split.train, rows)
            coefficients, constants, state, back = step(coefficients, constants, state, *data)
            returned += back
    return coefficients, constants, int(returned)


@lru_cache(maxsize=64)  # seeds share a compilation
def _training(
    spec: Spec, basis_name: str, method: str, density: float, total: int
) -> tuple[Any, Callable]:
    """The optimiser with pruning and regrowth behind it, and a compiled step."""
    basis, model, _, saliencies = changed(spec, basis_name != "space")
    every = max(total // 20, 1)
    schedule = flj.schedules.cubic(round(1 - density, 6), begin=every, end=3 * total // 4)
    common = {
        "mask_every": every,
        "aux_every": every,
        "regrow": partial(_share, until=9 * total // 10, share=_of_pruned(density)),
        "prunable": prunable_in(spec.name),
        "saliency": saliencies[basis_name, method],
    }
    if method == "fishleg":
        pruning = flj.fishleg_prune(model, schedule, **common)
    else:
        pruning = flj.gradual_prune(IDENTITY, schedule, model=model, compensation=NONE, **common)
    tx = optax.chain(optax.adam(optax.cosine_decay_schedule(RATE, total)), pruning)
    loss = loss_of(spec)

    @jax.jit
    def step(coefficients, constants, state, inputs, targets):
        def loss_in_basis(c):
            return loss(basis.weights(c), constants, inputs, targets)

        grads, new = jax.grad(loss_in_basis, has_aux=True)(coefficients)
        batch = as_batch(inputs, targets, constants)
        before = flj.masks(state)
        updates, state = tx.update(grads, state, coefficients, batch=batch)
        back = jax.tree.map(lambda old, now: (~old & now).sum(), before, flj.masks(state))
        coefficients = optax.apply_updates(coefficients, updates)
        return coefficients, new, state, sum(jax.tree.leaves(back))

    return tx, step


def _of_pruned(density: float) -> float:
    """`REPLACED` as a share of the pruned coefficients, which are many times as many.

    A tenth of these would be more than all that are kept at 5 %: every update would start anew.
    """
    return min(REPLACED * density / (1 - density), 1.0) if density < 1 else 0.0


def _share(step: jax.Array, until: int, share: float) -> jax.Array:
    """Share of coefficients that may come back, until the training's last tenth."""
    return jnp.where(step < until, share, 0.0)
