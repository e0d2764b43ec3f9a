"""Plain training and evaluation."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import fishleg_jax as flj
from experiments.data.datasets import Arrays
from experiments.models import checkpoints
from experiments.models.specs import Spec, as_batch
from experiments.running import processes

EVALUATION_BATCH = 1000


def applied_in_training(spec: Spec, params: Any, constants: Any, inputs: Any) -> tuple[Any, Any]:
    """Outputs with the statistics of the batch, and the averages that have taken them in."""
    variables = {"params": params, "batch_stats": constants}
    outputs, new = spec.module.apply(variables, inputs, train=True, mutable=["batch_stats"])
    return outputs, new["batch_stats"]


@lru_cache(maxsize=8)
def model_in_training(spec: Spec) -> flj.Model:
    """The model in training mode: batch norm uses the statistics of the batch."""

    def predict(params, inputs, constants=None):
        if not constants:
            return spec.model.predict(params, inputs)
        return applied_in_training(spec, params, constants, inputs)[0]

    return flj.Model(predict, spec.model.likelihood)


def loss_of(spec: Spec) -> Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]:
    """The loss that a network is trained on.

    Args:
        spec: the model.

    Returns:
        A function `(params, constants, inputs, targets) -> (loss, constants)`: batch norm uses the
        statistics of the batch, and takes them into its averages.
    """

    def mean_loss(params, constants, inputs, targets):
        if not constants:
            return flj.loss(spec.model, params, (inputs, targets)), constants
        outputs, new = applied_in_training(spec, params, constants, inputs)
        losses = spec.model.likelihood.negative_log_likelihood(outputs, targets)
        return losses.mean(), new

    return mean_loss


@lru_cache(maxsize=8)  # a training on, of one pruned network after the other, compiles once
def _make_step(spec: Spec, learning_rate: float, steps: int):
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)
    gradient = jax.grad(loss_of(spec), has_aux=True)

    def held(tree, masks):
        return tree if masks is None else flj.apply_masks(tree, masks)

    @jax.jit
    def step(params, constants, state, masks, inputs, targets):
        grads, constants = gradient(params, constants, inputs, targets)
        # no gradient of a pruned weight gets into the moments, nor a rounding into the weight
        updates, state = optimizer.update(held(grads, masks), state, params)
        return held(optax.apply_updates(params, updates), masks), constants, state

    return optimizer, step


def train(
    spec: Spec,
    data: Arrays,
    *,
    epochs: int | None = None,
    seed: int = 0,
    start: tuple[Any, Any] | None = None,
    masks: Any | None = None,
    learning_rate: float | None = None,
) -> tuple[Any, Any]:
    """Trains a model with AdamW and a cosine schedule, without augmentation.

    Args:
        spec: the model.
        data: the training inputs and targets.
        epochs: how often each example is seen; None for the model's own number.
        seed: for the initial weights and the order of the examples.
        start: parameters and constants to train on from; None for random ones.
        masks: which weights survive: all others are zero after every step.  None for all.
        learning_rate: the largest one; None for the model's own.

    Returns:
        The parameters and the constants.
    """
    inputs, targets = data
    batch = min(spec.train_batch, len(inputs))
    steps = len(inputs) // batch
    epochs = spec.epochs if epochs is None else epochs
    rate = spec.learning_rate if learning_rate is None else learning_rate
    params, constants = jax.jit(spec.init)(jax.random.key(seed)) if start is None else start
    optimizer, step = _make_step(spec, rate, epochs * steps)
    params, constants, state = processes.everywhere((params, constants, optimizer.init(params)))
    order = np.random.default_rng(seed)
    # one jitted step and a Python loop: in a lax.scan the gradient of a convolution is 30 times
    # slower on a CPU
    with tqdm(total=epochs * steps, desc=f"training {spec.name}", disable=None) as bar:
        for _ in range(epochs):
            chosen = order.permutation(len(inputs))[: steps * batch].reshape(steps, batch)
            for rows in chosen:
                params, constants, state = step(
                    params, constants, state, masks, *processes.read(data, rows)
                )
                bar.update()
    return params, constants


def trained(
    spec: Spec, data: Arrays, path: Path, *, epochs: int | None = None, seed: int = 0
) -> tuple[Any, Any]:
    """Trains a model, or reads it where that was done before.

    Args:
        spec: the model.
        data: the training inputs and targets.
        path: the npz file that keeps the weights.
        epochs: see `train`.
        seed: see `train`.

    Returns:
        The parameters and the constants.
    """
    if not processes.agreed(path.exists()):
        weights = train(spec, data, epochs=epochs, seed=seed)
        checkpoints.save(path, *weights)
        processes.wait(str(path))
    return checkpoints.load(path, spec)


@partial(jax.jit, static_argnames=("model", "mean"))
def _totals(model: flj.Model, mean: Callable | None, params: Any, batch: tuple, weights: jax.Array):
    outputs = model.predict(params, batch[0], *batch[2:])
    losses = model.likelihood.negative_log_likelihood(outputs, batch[1])
    if mean is None:
        correct = outputs.argmax(axis=-1) == batch[1]
        scores = 100 * correct.reshape(len(weights), -1).mean(axis=1)
    else:
        scores = jnp.square(mean(outputs) - batch[1]).sum(axis=1)
    return weights @ scores, weights @ losses


def evaluate(
    model: flj.Model,
    params: Any,
    data: Arrays,
    constants: Any,
    mean: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[float, float]:
    """Evaluates a classifier, or an auto-encoder.

    Args:
        model: the model.
        params: its parameters.
        data: the inputs and the targets.
        constants: its constants; may be empty.
        mean: of an auto-encoder, from its outputs to its reconstruction, `(examples, values)`.

    Returns:
        The accuracy in percent, of an auto-encoder the squared error summed over the values of an
        example; and the loss in nats; both means over examples.
    """
    inputs, targets = data
    examples = len(inputs)
    size = processes.dealt(min(EVALUATION_BATCH, examples))
    score = loss = 0.0
    for begin in range(0, examples, size):
        # the last batch is filled up with weightless examples: one shape, one compilation
        rows = np.arange(begin, begin + size)
        weights = np.asarray(rows < examples, np.float32)
        rows = np.minimum(rows, examples - 1)
        batch = as_batch(*processes.read((inputs, targets), rows), constants)
        totals = _totals(model, mean, params, batch, weights)
        score, loss = score + float(totals[0]), loss + float(totals[1])
    return score / examples, loss / examples


def accuracy(model: flj.Model, params: Any, batches: Sequence[tuple]) -> float:
    """The accuracy of a classifier on batches, in percent.

    Args:
        model: the model.
        params: its parameters.
        batches: as the library wants them.
    """
    sizes = [len(batch[0]) for batch in batches]
    scores = [
        float(_totals(model, None, params, batch, np.ones(size, np.float32))[0])
        for batch, size in zip(batches, sizes, strict=True)
    ]
    return sum(scores) / sum(sizes)
