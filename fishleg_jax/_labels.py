"""Calls of a likelihood's functions, with checks of them and of a batch's targets."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree


def losses(likelihood: Any, outputs: Any, targets: Any) -> jax.Array:
    """Negative log-likelihood, one number per example; raises a ValueError for another shape."""
    check_values(likelihood, outputs, targets)
    values = likelihood.negative_log_likelihood(outputs, targets)
    examples = jnp.shape(jax.tree.leaves(targets)[0])[0]
    if jnp.shape(values) != (examples,):
        raise ValueError(
            f"likelihood: negative_log_likelihood must return one number for each of the "
            f"{examples} examples, shape {(examples,)}, got shape {jnp.shape(values)}; sum over "
            "an example's outputs, and do not average over examples"
        )
    return values


def sample(likelihood: Any, key: jax.Array, outputs: Any, targets: Any) -> Any:
    """Draws targets from a likelihood; outputs excluded by the batch's targets stay excluded."""
    require(likelihood, ("sample",), "sampled labels")
    if likelihood.takes_targets:
        return likelihood.sample(key, outputs, targets)
    return likelihood.sample(key, outputs)


def fisher(likelihood: Any, outputs: Any, targets: Any, tangent: Any) -> Any:
    """Product of the output-space Fisher with a tangent, zero for outputs the targets exclude."""
    require(likelihood, ("fisher",), "kind='exact'")
    if likelihood.takes_targets:
        return likelihood.fisher(outputs, tangent, targets)
    return likelihood.fisher(outputs, tangent)


def noise(likelihood: Any, key: jax.Array, outputs: Any, targets: Any) -> Any:
    """Random cotangent of the outputs whose covariance is the Fisher in output space.

    Random signs times a root of that Fisher.  Like a score of sampled labels it has mean zero and
    is independent between examples, but its square hardly varies.
    """
    leaves, tree = jax.tree.flatten(outputs)
    signs = tree.unflatten(
        [
            jax.random.rademacher(k, x.shape, _tree.wide_dtype(x.dtype))
            for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
    )
    if likelihood.takes_targets:
        return likelihood.root(outputs, signs, targets)
    return likelihood.root(outputs, signs)


def require(likelihood: Any, names: Sequence[str], what: str) -> None:
    """Raises a ValueError if a likelihood lacks any of the named functions."""
    for name in names:
        if getattr(likelihood, name) is None:
            raise ValueError(
                f"{what}: the model's likelihood has {name}=None; pass that function, "
                f"likelihoods.Likelihood(..., {name}=...), or use kind or labels 'empirical'"
            )


def require_kind(likelihood: Any, kind: str) -> None:
    """Raises a ValueError if a likelihood lacks the function for Fisher products of a kind."""
    names = {"exact": ("fisher",), "sampled": ("sample",)}.get(kind, ())
    require(likelihood, names, f"{kind!r} Fisher products")


def check_values(likelihood: Any, outputs: Any, targets: Any) -> None:
    """Raises a ValueError for readable targets outside a likelihood's support."""
    if likelihood.check_targets is None or not _is_known(targets):
        return
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs)
    likelihood.check_targets(shapes, targets)


def _is_known(targets: Any) -> bool:
    """Whether the values of targets can be read on this host."""
    leaves = jax.tree.leaves(targets)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    elsewhere = any(isinstance(x, jax.Array) and not is_here(x) for x in leaves)
    return not abstract and not elsewhere


def is_here(x: jax.Array) -> bool:
    """Whether an array is concrete and fully addressable from this host."""
    return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


def check_outside(ignore: int, classes: int) -> None:
    """Raises a ValueError if the label of padding is one of the classes."""
    if 0 <= ignore < classes:
        raise ValueError(
            f"ignore must lie outside the {classes} classes, got {ignore}: give padding its own "
            "label, such as jnp.where(padding, -100, labels) with ignore=-100"
        )


def as_signed(labels: Any) -> jax.Array:
    """Labels in a signed integer type, which can be compared with any label of padding."""
    return jnp.asarray(labels).astype(jnp.promote_types(jnp.result_type(labels), jnp.int32))


def has_nan(targets: Any) -> bool:
    """Whether readable targets contain a NaN or infinity, which training steps survive."""
    if not _is_known(targets):
        return False
    leaves = [np.asarray(x) for x in jax.tree.leaves(targets)]
    reals = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return not all(np.isfinite(x.astype(np.float32)).all() for x in reals)


def check_shape(targets: Any, expected: tuple[int, ...], of_what: str) -> None:
    """Raises a ValueError for targets of another shape."""
    if jnp.shape(targets) != expected:
        raise ValueError(
            f"targets must have the shape of the {of_what}, {expected}, got {jnp.shape(targets)}"
        )


def one_array(outputs: Any, name: str, dimensions: int = 1) -> jax.Array:
    """Returns outputs that are a single array in float32 or better, or raises a ValueError."""
    if not hasattr(outputs, "ndim") or outputs.ndim < dimensions:
        found = [jnp.shape(x) for x in jax.tree.leaves(outputs)]
        axes = "(examples, ..., classes)" if dimensions == 2 else "(examples, ...)"
        raise ValueError(
            f"outputs of the model must be one array of shape {axes} for {name}, got "
            f"{type(outputs).__name__} with shapes {found}"
        )
    return _tree.widen(outputs)


def check_real(targets: Any, expected: tuple[int, ...]) -> None:
    """Raises a ValueError unless targets are real numbers, one per output."""
    check_shape(targets, expected, "outputs")
    dtype = jnp.result_type(targets)
    kinds = jnp.floating, jnp.integer, jnp.bool_
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise ValueError(f"targets must be real numbers, got dtype {dtype}")


def check_range(targets: Any, valid: Any, expected: str) -> None:
    """Raises a ValueError that reports the first invalid target, if any.

    Args:
        targets: Concrete array of targets.
        valid: Function `(values) -> boolean array`.
        expected: Description of valid targets for the error message.
    """
    values = np.asarray(targets)
    if values.dtype.kind not in "biuf":  # bfloat16 and the like
        values = values.astype(np.float32)
    wrong = values[~valid(values)]
    if wrong.size:
        raise ValueError(f"targets must {expected}, got {wrong[0]}")
