"""What a network's outputs mean: a distribution over targets, and its Fisher in output space.

A `Likelihood` is three pure functions.  All of them treat the leading axis of the outputs as
examples; everything behind it (tokens, pixels, dimensions) is summed, never averaged, so that
damping and gradients share one scale: *per example*.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text

Outputs = Any


class Likelihood(NamedTuple):
    """A distribution `p(target | outputs)` as three pure functions.

    Attributes:
        negative_log_likelihood: `(outputs, targets) -> (examples,)`, summed over all but the
            leading axis.
        sample: `(key, outputs) -> targets`, one target for every output.
        fisher: `(outputs, tangent) -> cotangent`, the product of the Fisher information in output
            space `E[∇log p ∇log pᵀ]` with a tangent of the same structure as the outputs.  Not
            averaged over examples.
    """

    negative_log_likelihood: Callable[[Outputs, Any], jax.Array]
    sample: Callable[[jax.Array, Outputs], Any]
    fisher: Callable[[Outputs, Outputs], Outputs]

    def __repr__(self) -> str:
        """One line: the function that made it, and what it has beside the necessary."""
        return _text.by_maker(self)


def _sum_per_example(values: jax.Array) -> jax.Array:
    return values.reshape(values.shape[0], -1).sum(axis=1)


def _check_shape(targets: Any, outputs: jax.Array) -> None:
    if jnp.shape(targets) != outputs.shape:
        raise ValueError(
            f"targets must have the shape of the outputs, {outputs.shape}, got {jnp.shape(targets)}"
        )


def categorical() -> Likelihood:
    """Classes with the outputs as logits: `p = softmax(outputs)`.

    Outputs have shape `(examples, ..., classes)` and targets are integers of shape
    `(examples, ...)`.  The Fisher in output space is `diag(p) - ppᵀ` (Martens 2020, eq. 16).

    Returns:
        The likelihood.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> logits = jnp.zeros((2, 4))
        >>> likelihoods.categorical().negative_log_likelihood(logits, jnp.array([0, 3])).round(3)
        Array([1.386, 1.386], dtype=float32)
    """

    def negative_log_likelihood(logits, targets):
        _check_shape(targets, logits[..., 0])
        log_p = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_p, targets[..., None].astype(jnp.int32), axis=-1)
        return -_sum_per_example(chosen)

    def sample(key, logits):
        return jax.random.categorical(key, logits)

    def fisher(logits, tangent):
        p = jax.nn.softmax(logits)
        pv = p * tangent
        return pv - p * pv.sum(axis=-1, keepdims=True)

    return Likelihood(negative_log_likelihood, sample, fisher)


def bernoulli() -> Likelihood:
    """Independent binary variables with the outputs as logits: `p = sigmoid(outputs)`.

    Outputs and targets have shape `(examples, ...)`; targets lie in [0, 1], and values between
    (grey pixels) are read as probabilities.  The Fisher in output space is `diag(p(1 - p))`.

    Returns:
        The likelihood.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> likelihoods.bernoulli().fisher(jnp.zeros((1, 2)), jnp.ones((1, 2)))
        Array([[0.25, 0.25]], dtype=float32)
    """

    def negative_log_likelihood(logits, targets):
        _check_shape(targets, logits)
        # softplus(x) - t x, which is -t log p - (1 - t) log(1 - p) without forming p
        return _sum_per_example(jax.nn.softplus(logits) - targets * logits)

    def sample(key, logits):
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)

    def fisher(logits, tangent):
        p = jax.nn.sigmoid(logits)
        return p * (1 - p) * tangent

    return Likelihood(negative_log_likelihood, sample, fisher)


def gaussian(scale: float | None = 1.0) -> Likelihood:
    """Independent normal variables with a known or a learned standard deviation.

    With a known `scale` the outputs are the means, of shape `(examples, ...)`, and the Fisher in
    output space is `I / scale²`.  With `scale=None` the outputs are a pair `(mean, log_scale)`
    whose second part broadcasts against the first; the Fisher is `1 / scale²` for a mean and 2 for
    a log scale (summed over the means that share it), with no cross terms.

    Args:
        scale: the known standard deviation, in the targets' unit; or None to learn it.

    Returns:
        The likelihood.

    Raises:
        ValueError: `scale` is given and is not a positive finite number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> likelihoods.gaussian(scale=0.5).fisher(jnp.zeros((1, 2)), jnp.ones((1, 2)))
        Array([[4., 4.]], dtype=float32)
    """
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive finite number or None, got {scale!r}")

    def broadcast(outputs):
        if scale is None:
            mean, log_scale = outputs
            return mean, jnp.broadcast_to(log_scale, mean.shape)
        return outputs, jnp.full(outputs.shape, jnp.log(scale), outputs.dtype)

    def negative_log_likelihood(outputs, targets):
        mean, log_scale = broadcast(outputs)
        _check_shape(targets, mean)
        error = (targets - mean) * jnp.exp(-log_scale)
        return _sum_per_example(0.5 * error**2 + log_scale + 0.5 * jnp.log(2 * jnp.pi))

    def sample(key, outputs):
        mean, log_scale = broadcast(outputs)
        return mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape, mean.dtype)

    def fisher(outputs, tangent):
        if scale is not None:
            return tangent / scale**2
        # a log scale that several means share collects the information of all of them, which is
        # what the transpose of the broadcast does
        (_, log_scale), (v_mean, v_scale) = jax.jvp(broadcast, (outputs,), (tangent,))
        _, pull_back = jax.vjp(broadcast, outputs)
        (product,) = pull_back((v_mean * jnp.exp(-2 * log_scale), 2 * v_scale))
        return product

    return Likelihood(negative_log_likelihood, sample, fisher)


__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian"]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
