"""Means and batches over a named axis, inside `shard_map`, `pmap` or a `vmap` with one."""

from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._batch import BatchLike, split_batch


def check_name(axis_name: Any) -> None:
    """Raises a ValueError for an invalid axis name; None is valid."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    sound = names and all(isinstance(name, str) and name for name in names)
    if axis_name is not None and not sound:
        raise ValueError(
            "axis_name must be the name of an axis, a tuple of names or None, got "
            f"{_text.shown(axis_name)}"
        )


def varying(tree: Any, axis_name: str | None) -> Any:
    """Marks replicated arrays as varying over devices, so that gradients are not summed.

    In `shard_map` a gradient with respect to replicated arrays is summed over devices, elsewhere it
    is not; with respect to varying arrays it never is.
    """
    if axis_name is None:
        return tree
    zero = 0 * jax.lax.axis_index(axis_name)  # `lax.pcast` works in shard_map only
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def mean(tree: Any, axis_name: str | None) -> Any:
    """Mean over the devices of an axis; the tree itself without one."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def everywhere(flag: jax.Array, axis_name: str | None) -> jax.Array:
    """Whether a flag is true on all devices."""
    return flag if axis_name is None else jax.lax.psum((~flag).astype(jnp.int32), axis_name) == 0


def gather(batch: BatchLike, axis_name: str) -> BatchLike:
    """Gathers the examples of all devices into one replicated batch; constants stay local."""
    index, number = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def whole(x):
        x = jnp.asarray(x)
        summable = x.astype(jnp.int32) if x.dtype == bool else x
        empty = jnp.zeros((number * x.shape[0], *x.shape[1:]), summable.dtype)
        placed = jax.lax.dynamic_update_slice_in_dim(empty, summable, index * x.shape[0], 0)
        # shard_map treats a sum, unlike a gather, as replicated
        return jax.lax.psum(placed, axis_name).astype(x.dtype)

    inputs, targets, constants = split_batch(batch)
    return (*jax.tree.map(whole, (inputs, targets)), *constants)
