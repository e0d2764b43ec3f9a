"""Likelihoods: distributions of targets given a network's outputs, with their output-space Fisher.

A `Likelihood` is three pure functions.  All of them treat the leading axis of the outputs as
examples; all other axes (tokens, pixels, dimensions) are summed, never averaged, so that damping
and gradients share one scale: *per example*.  The likelihoods of this module compute in float32 or
better, whatever the dtype of the outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _labels, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._likelihood import Likelihood, check_ignore, sum_per_example


def categorical(ignore: int | None = None) -> Likelihood:
    """Categorical distribution with the outputs as logits: `p = softmax(outputs)`.

    Outputs have shape `(examples, ..., classes)` and targets are integers of shape
    `(examples, ...)` in `0` to `classes - 1`.  A label out of range makes the loss and the gradient
    of its example NaN.  The Fisher in output space is `diag(p) - ppᵀ` (Martens 2020, eq. 16).

    Args:
        ignore: Label of padding, outside the classes, such as -100: tokens with it are excluded
            from losses, gradients and all Fishers (exact and sampled Fishers take it from the
            batch's targets, and exclude nothing if these are None), and from the counts of
            `disagreement`.  None to include all tokens.

    Returns:
        A `Likelihood`; the same object for equal arguments.

    Raises:
        ValueError: `ignore` is neither a whole number nor None, or, when used, is one of the
            classes.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> logits = jnp.zeros((2, 4))
        >>> likelihoods.categorical().negative_log_likelihood(logits, jnp.array([0, 3])).round(3)
        Array([1.386, 1.386], dtype=float32)
        >>> padded = likelihoods.categorical(ignore=-100)
        >>> padded.negative_log_likelihood(logits, jnp.array([0, -100])).round(3)
        Array([1.386, 0.   ], dtype=float32)
    """
    return _categorical(check_ignore(ignore))


@functools.cache
def _categorical(ignore: int | None) -> Likelihood:
    def read(logits, labels):
        """Returns logits in float32 or better, signed integer labels, and the mask of padding."""
        logits = _labels.one_array(logits, "categorical", 2)
        classes = logits.shape[-1]
        if ignore is not None:
            _labels.check_outside(ignore, classes)
        if labels is None:
            return logits, None, None
        dtype = jnp.result_type(labels)
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_)):
            raise ValueError(f"targets must be class labels of an integer type, got dtype {dtype}")
        _labels.check_shape(labels, logits.shape[:-1], "outputs without the axis of classes")
        labels = _labels.as_signed(labels)
        ignored = None if ignore is None else labels == ignore
        return logits, labels, ignored

    def negative_log_likelihood(logits, targets):
        logits, labels, ignored = read(logits, targets)
        known = (labels >= 0) & (labels < logits.shape[-1])
        log_p = jax.nn.log_softmax(logits)
        index = jnp.where(known, labels, 0)[..., None].astype(jnp.int32)
        chosen = jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
        # multiplying by NaN, unlike replacing by NaN, makes the gradient NaN as well
        factor = jnp.where(known if ignored is None else known | ignored, 1, jnp.nan)
        losses = -chosen * factor.astype(chosen.dtype)
        return sum_per_example(losses if ignored is None else jnp.where(ignored, 0, losses))

    def sample(key, logits, targets=None):
        logits, labels, ignored = read(logits, targets if ignore is not None else None)
        drawn = jax.random.categorical(key, logits)
        return drawn if ignored is None else jnp.where(ignored, labels, drawn).astype(drawn.dtype)

    def fisher(logits, tangent, targets=None):
        logits, _, ignored = read(logits, targets if ignore is not None else None)
        # (diag(p) - ppᵀ) v without forming the matrix
        p = jax.nn.softmax(logits)
        pv = p * tangent
        product = pv - p * pv.sum(axis=-1, keepdims=True)
        if ignored is not None:
            product = jnp.where(ignored[..., None], 0, product)
        return product.astype(jnp.result_type(tangent))

    def root(logits, tangent, targets=None):
        logits, _, ignored = read(logits, targets if ignore is not None else None)
        # (diag(√p) - p √pᵀ) v, as R Rᵀ = diag(p) - ppᵀ
        p = jax.nn.softmax(logits)
        v = jnp.sqrt(p) * tangent
        product = v - p * v.sum(axis=-1, keepdims=True)
        if ignored is not None:
            product = jnp.where(ignored[..., None], 0, product)
        return product.astype(jnp.result_type(tangent))

    def check_targets(outputs, targets):
        # shapes and dtypes first, then the range of the values
        jax.eval_shape(read, outputs, targets)
        classes = outputs.shape[-1]
        if ignore is None:
            valid = lambda labels: (labels >= 0) & (labels < classes)
            expected = (
                f"be labels from 0 to {classes - 1}, for the {classes} classes of the outputs "
                "(to ignore padding, use likelihoods.categorical(ignore=-100))"
            )
        else:
            valid = lambda labels: ((labels >= 0) & (labels < classes)) | (labels == ignore)
            expected = (
                f"be labels from 0 to {classes - 1}, for the {classes} classes of the outputs, or "
                f"{ignore} for those to ignore"
            )
        _labels.check_range(targets, valid, expected)

    functions = negative_log_likelihood, sample, fisher, check_targets
    return Likelihood(*functions, ignore is not None, root, ignore)


def bernoulli() -> Likelihood:
    """Independent Bernoulli variables with the outputs as logits: `p = sigmoid(outputs)`.

    Outputs and targets have shape `(examples, ...)`; targets lie in [0, 1], and values in between
    (grey pixels) are treated as probabilities.  A target out of range makes the loss and the
    gradient of its example NaN.  The Fisher in output space is `diag(p(1 - p))`.

    Returns:
        A `Likelihood`; the same object in every call.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> likelihoods.bernoulli().fisher(jnp.zeros((1, 2)), jnp.ones((1, 2)))
        Array([[0.25, 0.25]], dtype=float32)
    """
    return _bernoulli()


@functools.cache
def _bernoulli() -> Likelihood:
    def read(logits):
        return _labels.one_array(logits, "bernoulli")

    def negative_log_likelihood(logits, targets):
        logits = read(logits)
        _labels.check_real(targets, logits.shape)
        targets = jnp.asarray(targets)
        targets = jnp.where((targets >= 0) & (targets <= 1), targets, jnp.nan)
        # softplus(x) - t x, which is -t log p - (1 - t) log(1 - p) without forming p
        return sum_per_example(jax.nn.softplus(logits) - targets * logits)

    def sample(key, logits):
        logits = read(logits)
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)

    def fisher(logits, tangent):
        p = jax.nn.sigmoid(read(logits))
        return (p * (1 - p) * tangent).astype(jnp.result_type(tangent))

    def root(logits, tangent):
        p = jax.nn.sigmoid(read(logits))
        return (jnp.sqrt(p * (1 - p)) * tangent).astype(jnp.result_type(tangent))

    def check_targets(outputs, targets):
        _labels.check_real(targets, jax.eval_shape(read, outputs).shape)
        _labels.check_range(targets, lambda t: (t >= 0) & (t <= 1), "lie in [0, 1]")

    return Likelihood(negative_log_likelihood, sample, fisher, check_targets, root=root)


def gaussian(scale: float | None = 1.0) -> Likelihood:
    """Independent normal variables with a known or a learned standard deviation.

    With a known `scale` the outputs are the means, of shape `(examples, ...)`, and the Fisher in
    output space is `I / scale²`.  With `scale=None` the outputs are a pair `(mean, log_scale)`
    whose second part broadcasts against the first; the Fisher is `1 / scale²` for a mean and 2 for
    a log scale (summed over the means that share it), with no cross terms.

    Args:
        scale: Known standard deviation in units of the targets; None to learn it as an output.

    Returns:
        A `Likelihood`; the same object for equal arguments.

    Raises:
        ValueError: `scale` is neither a positive finite number nor None.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> likelihoods.gaussian(scale=0.5).fisher(jnp.zeros((1, 2)), jnp.ones((1, 2)))
        Array([[4., 4.]], dtype=float32)
    """
    return _gaussian(None if scale is None else numbers.check_positive(scale, "scale", " or None"))


@functools.cache
def _gaussian(scale: float | None) -> Likelihood:
    def broadcast(outputs):
        if scale is None:
            if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
                raise ValueError(
                    "outputs of the model must be a pair (mean, log_scale) for "
                    f"gaussian(scale=None), got {type(outputs).__name__}"
                )
            mean, log_scale = _tree.widen(tuple(outputs))
            return mean, jnp.broadcast_to(log_scale, mean.shape)
        mean = _labels.one_array(outputs, "gaussian")
        return mean, jnp.full(mean.shape, jnp.log(scale), mean.dtype)

    def negative_log_likelihood(outputs, targets):
        mean, log_scale = broadcast(outputs)
        _labels.check_real(targets, mean.shape)
        error = (targets - mean) * jnp.exp(-log_scale)
        return sum_per_example(0.5 * error**2 + log_scale + 0.5 * jnp.log(2 * jnp.pi))

    def sample(key, outputs):
        mean, log_scale = broadcast(outputs)
        return mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape, mean.dtype)

    def fisher(outputs, tangent):
        if scale is not None:
            return tangent / scale**2
        # a log scale shared by several means collects the information of all of them, which the
        # transpose of the broadcast sums up
        (_, log_scale), (v_mean, v_scale) = jax.jvp(broadcast, (outputs,), (tangent,))
        _, pull_back = jax.vjp(broadcast, outputs)
        (product,) = pull_back((v_mean * jnp.exp(-2 * log_scale), 2 * v_scale))
        return product

    def root(outputs, tangent):
        return tangent / scale

    def check_targets(outputs, targets):
        mean, _ = jax.eval_shape(broadcast, outputs)
        _labels.check_real(targets, mean.shape)
        _labels.check_range(targets, np.isfinite, "be finite")

    known = None if scale is None else root
    return Likelihood(negative_log_likelihood, sample, fisher, check_targets, root=known)


__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian"]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
