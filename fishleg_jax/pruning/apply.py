"""Applies masks to weights, and measures the sparsity of weights."""

from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _prunable, _tree
from fishleg_jax._devices import placement
from fishleg_jax._tree import apply_mask
from fishleg_jax.pruning.gradual.state import find_state, holds_state


def apply_masks(params: Any, masks: Any) -> Any:
    """Returns the parameters with exact zeros where the masks are False.

    Args:
        params: Any pytree of arrays.
        masks: Pytree of booleans of the same structure and shapes; or the state of an optimiser
            with a gradual pruning in it, whose masks are used.

    Returns:
        A pytree like the parameters, in their dtypes.

    Raises:
        ValueError: The structures or shapes differ.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.apply_masks(jnp.array([1.0, jnp.inf]), jnp.array([True, False]))
        Array([1., 0.], dtype=float32)
    """
    if holds_state(masks):
        masks = find_state(masks).masks
    elif hasattr(masks, "report") and hasattr(masks, "masks"):
        raise ValueError(
            f"masks must be a pytree of booleans like the parameters, got a "
            f"{type(masks).__name__}: use its masks, as in apply_masks(params, result.masks)"
        )
    _tree.check_same(params, masks, "masks")
    return placement.like(apply_mask(params, masks), params)


def sparsity(params: Any, prunable: _prunable.LeafSelection = None) -> float:
    """Fraction of the prunable weights that are exactly zero.

    Args:
        params: Weights, any pytree.
        prunable: Leaves to count: regular expressions over key paths, a mapping of these to
            booleans, a pytree of booleans, or a predicate `(name, leaf) -> bool`; by default all
            but vectors, biases, normalisations, embeddings and positions.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: A `Result` in place of its weights; an invalid or empty selection.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.sparsity({"kernel": jnp.eye(2), "bias": jnp.zeros(2)})
        0.5
    """
    if hasattr(params, "report") and hasattr(params, "masks"):
        raise ValueError(
            f"params must be weights, got a {type(params).__name__}: use its params, as in "
            "sparsity(result.params)"
        )
    chosen = _prunable.select(params, prunable, "prunable")
    leaves = [x for x, yes in zip(jax.tree.leaves(params), chosen, strict=True) if yes]
    return sum(int(jnp.sum(x == 0)) for x in leaves) / max(sum(x.size for x in leaves), 1)
