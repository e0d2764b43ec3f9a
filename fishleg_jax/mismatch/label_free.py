"""A network's own outputs as targets, to prune without labels."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _labels, _text, likelihoods
from fishleg_jax._batch import BatchLike, plain
from fishleg_jax._checks import arrays
from fishleg_jax._jit import jitted
from fishleg_jax.likelihoods import Likelihood
from fishleg_jax.model import Model, check_model, predict


def label_free(
    model: Model, params: Any, batches: Sequence[BatchLike]
) -> tuple[Model, list[BatchLike]]:
    """Replaces labels by the network's own predicted probabilities, to prune against them.

    The exact Fisher needs no labels, but the gradient in a compensation and the loss on held-out
    examples do.  Against the dense network as a teacher that loss is, up to a constant, the
    Kullback-Leibler divergence from it: its gradient is zero at the dense weights, and what pruning
    keeps low is the change of the predictions, right or wrong.

    Args:
        model: Model with the likelihood `categorical()`, `bernoulli()` or `gaussian()`.  With
            `categorical(ignore=-100)` padding stays out of the loss and of all Fishers.
        params: Weights of the dense network.
        batches: Batches whose targets are replaced.  They may be None; then no output counts as
            padding.

    Returns:
        The model with the same predictions, and a likelihood that takes probabilities of classes
        for targets if it was `categorical()`; and the batches with the network's outputs as
        targets: probabilities, zero for all classes where the label is padding, or for `gaussian()`
        means.

    Raises:
        ValueError: Another likelihood, invalid batches, or with `categorical(ignore=)` invalid
            labels.

    References:
        Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015, eq. 2 at
        temperature 1.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.categorical())
        >>> weights, batch = jnp.zeros((3, 2)), (jnp.ones((1, 3)), None)
        >>> matched, batches = flj.label_free(model, weights, [batch])
        >>> batches[0][1]
        Array([[0.5, 0.5]], dtype=float32)
        >>> flj.loss(matched, weights, batches[0]).round(3)
        Array(0.693, dtype=float32)
    """
    check_model(model)
    arrays.check_batches(batches)
    ignore = model.likelihood.ignore
    kinds = (
        (likelihoods.categorical(ignore), jax.nn.softmax, soft_categorical(ignore is not None)),
        (likelihoods.bernoulli(), jax.nn.sigmoid, likelihoods.bernoulli()),
        (likelihoods.gaussian(), lambda outputs: outputs, likelihoods.gaussian()),
    )
    found = [(make, likelihood) for known, make, likelihood in kinds if known == model.likelihood]
    if not found:
        raise ValueError(
            "model must have the likelihood categorical(), with or without ignore, bernoulli() or "
            f"gaussian(), got {_text.shown(model.likelihood)}"
        )
    targets_of, likelihood = found[0]
    outputs_of = jitted(predict, model)
    replaced = []
    for batch in batches:
        inputs, labels, *constants = plain(batch)
        outputs = outputs_of(params, (inputs, None, *constants))
        targets = targets_of(outputs)
        if ignore is not None and labels is not None:
            _labels.check_values(model.likelihood, outputs, labels)
            targets = jnp.where((_labels.as_signed(labels) == ignore)[..., None], 0, targets)
        replaced.append((inputs, targets, *constants))
    return model._replace(likelihood=likelihood), replaced


@functools.cache
def soft_categorical(padded: bool = False) -> Likelihood:
    """Categorical distribution whose targets are probabilities of the classes.

    Args:
        padded: Whether targets that are zero for all classes are padding, which losses and Fishers
            leave out.

    Returns:
        A `Likelihood` with the loss `−Σ t log softmax(outputs)` for targets t of the outputs'
        shape, and the Fisher of `categorical()`; the same object for equal arguments.
    """
    hard = likelihoods.categorical()

    def without_padding(values, targets):
        if not padded or targets is None:
            return values
        return jnp.where((targets == 0).all(axis=-1, keepdims=True), 0, values)

    def negative_log_likelihood(outputs, targets):
        logits = _labels.one_array(outputs, "label_free", 2)
        _labels.check_real(targets, logits.shape)
        losses = without_padding(-(targets * jax.nn.log_softmax(logits)), targets)
        return losses.reshape(losses.shape[0], -1).sum(axis=1)

    def sample(key, outputs, targets=None):
        logits = _labels.one_array(outputs, "label_free", 2)
        drawn = jax.nn.one_hot(hard.sample(key, logits), logits.shape[-1], dtype=logits.dtype)
        return without_padding(drawn, targets)

    def fisher(outputs, tangent, targets=None):
        return without_padding(hard.fisher(outputs, tangent), targets)

    def root(outputs, tangent, targets=None):
        return without_padding(hard.root(outputs, tangent), targets)

    def check_targets(outputs, targets):
        _labels.check_real(targets, jnp.shape(outputs))
        within = lambda t: (np.asarray(t) >= 0) & (np.asarray(t) <= 1)
        _labels.check_range(targets, within, "be probabilities in [0, 1]")

    return Likelihood(negative_log_likelihood, sample, fisher, check_targets, padded, root)
