"""What the kept weights do about the pruned ones: nothing, or the sum of single-weight corrections.

A compensation is a function `(params, old_mask, new_mask, curvature, estimator, state) -> (delta,
info)`: a change of the parameters that makes the newly pruned ones exactly zero, and a dictionary
of what is worth telling.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._jit import jitted
from fishleg_jax.fisher import Curvature
from fishleg_jax.inverse.base import InverseFisher

Compensation = Callable[..., tuple[Any, dict]]


def _to_zero(params: Any, delta: Any, new_mask: Any) -> Any:
    """The delta with `-w` for every pruned weight."""
    return jax.tree.map(lambda w, d, m: jnp.where(m, d, -w), params, delta, new_mask)


def none() -> Compensation:
    """The kept weights stay as they are.

    Returns:
        A compensation.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> keep = flj.compensation.none()
        >>> mask = jnp.array([True, False])
        >>> keep(jnp.array([1.0, 2.0]), jnp.array([True, True]), mask, None, None, None)[0]
        Array([ 0., -2.], dtype=float32)
    """

    def compensate(
        params: Any,
        old_mask: Any,
        new_mask: Any,
        curvature: Curvature | None,
        estimator: InverseFisher,
        state: Any,
    ) -> tuple[Any, dict]:
        del old_mask, curvature, estimator, state
        params = _tree.widen(params)
        return _to_zero(params, jax.tree.map(jnp.zeros_like, params), new_mask), {}

    return compensate


def independent() -> Compensation:
    """The corrections of Optimal Brain Surgeon for every pruned weight by itself, added up.

    `δ = −F⁻¹ (1_S ⊙ w / diag F⁻¹)`, and then the pruned set S is put to zero exactly: what
    WoodFisher, M-FAC and FLS do (Singh & Alistarh 2020, section 4).  With the identity for an
    inverse it changes no kept weight.

    Returns:
        A compensation.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> identity, correct = flj.inverse.identity(), flj.compensation.independent()
        >>> old, new = jnp.array([True, True]), jnp.array([True, False])
        >>> correct(jnp.array([1.0, 2.0]), old, new, None, identity, ())[0]
        Array([-0., -2.], dtype=float32)
    """

    def compensate(
        params: Any,
        old_mask: Any,
        new_mask: Any,
        curvature: Curvature | None,
        estimator: InverseFisher,
        state: Any,
    ) -> tuple[Any, dict]:
        del curvature
        correct = jitted(_independent, estimator)
        return correct(state, _tree.widen(params), old_mask, new_mask), {}

    return compensate


def _independent(
    estimator: InverseFisher, state: Any, params: Any, old_mask: Any, new_mask: Any
) -> Any:
    diagonal = estimator.diagonal(state, params, old_mask)
    multipliers = jax.tree.map(
        lambda w, q, old, new: jnp.where(old & ~new, w / jnp.where(old, q, 1), 0),
        params,
        diagonal,
        old_mask,
        new_mask,
    )
    delta = jax.tree.map(jnp.negative, estimator.multiply(state, multipliers, old_mask))
    return _to_zero(params, delta, new_mask)
