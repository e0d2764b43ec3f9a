"""Grafting: the direction of one optimiser with the step lengths of another, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def grafted(name: str | None) -> optax.GradientTransformation | None:
    """Optimiser whose step lengths are taken; None without grafting."""
    if name is None:
        return None
    return optax.identity() if name == "sgd" else optax.scale_by_adam()


def with_lengths(direction: Any, steps: Any) -> Any:
    """Gives every leaf of a direction the Euclidean length of the same leaf of other steps."""

    def one(d, s):
        length = jnp.sqrt(jnp.sum(d * d))
        scale = jnp.sqrt(jnp.sum(s * s)) / jnp.maximum(length, jnp.finfo(d.dtype).tiny)
        return d * jnp.where(length > 0, scale, 0)

    return jax.tree.map(one, direction, steps)
