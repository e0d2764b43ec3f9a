"""Random numbers for the leaves of a pytree, in one draw.

One draw per leaf takes long to compile: half a second each, for a program that runs in none.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def like(
    leaves: Sequence[Any], key: jax.Array, draw: Callable[..., jax.Array] = jax.random.normal
) -> list[jax.Array]:
    """Draws arrays of given shapes and dtypes.

    Args:
        leaves: Arrays, or anything with their shapes and dtypes.
        key: Random key.
        draw: Function `(key, shape, dtype)` that draws a vector; standard normal by default.
    """
    sizes = [math.prod(x.shape) for x in leaves]
    flat = draw(key, (sum(sizes),), jnp.result_type(*leaves))
    parts = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
    return [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, leaves, strict=True)]


def signs(key: jax.Array, shape: tuple[int], dtype: Any) -> jax.Array:
    """Draws a vector of random signs, 32 from each random word."""
    (size,) = shape
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return 1 - 2 * bits.reshape(-1)[:size].astype(dtype)
