"""Training on after pruning, with the masks held."""

import time
from typing import Any

import jax

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import training
from experiments.models.specs import Spec
from experiments.running import results

SLOWER = 0.1  # of the model's own learning rate, unless a user says otherwise


def settings_of(spec: Spec, epochs: int | None, rate: float | None) -> dict[str, Any]:
    """The settings that belong to a result: none where nothing is trained on.

    Args:
        spec: the model.
        epochs: how often each training image is seen again; None for not at all.
        rate: the largest learning rate; None for a tenth of the model's.
    """
    if epochs is None:
        return {}
    return {"finetune": epochs, "finetune_rate": rate or SLOWER * spec.learning_rate}


def finetuned(
    spec: Spec,
    dense: results.Dense,
    split: datasets.Data,
    result: flj.Result,
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """Trains a pruned network on, and evaluates the result.

    Args:
        spec: the model.
        dense: the network before it was pruned, with its constants.
        split: the data set: trained on its training images, evaluated on its test images.
        result: the pruned network.
        epochs: how often each training image is seen.
        rate: the largest learning rate.
        seed: for the order of the images.

    Returns:
        Further fields for its object of `results.json`; the seconds include the compilation, which
        the first network of a kind needs.
    """
    begin = time.perf_counter()
    params, constants = training.train(
        spec,
        split.train,
        epochs=epochs,
        seed=seed,
        start=(result.params, dense.constants),
        masks=result.masks,
        learning_rate=rate,
    )
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    accuracy, loss = training.evaluate(spec.model, params, split.test, constants)
    return {"finetuned_accuracy": accuracy, "finetuned_loss": loss, "finetune_seconds": seconds}
