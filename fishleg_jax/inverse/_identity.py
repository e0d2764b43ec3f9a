"""The identity as inverse Fisher, which ignores curvature."""

import functools

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse.base import InverseFisher


def identity() -> InverseFisher:
    """The identity as inverse Fisher, with which OBS prunes by magnitude.

    Returns:
        An `InverseFisher` that needs neither a model nor data, the same object in every call, so
        that its functions compile once.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> estimator = flj.inverse.identity()
        >>> estimator.multiply(estimator.init(jnp.ones(2)), jnp.array([1.0, 2.0]))
        Array([1., 2.], dtype=float32)
    """
    return _identity()


@functools.cache
def _identity() -> InverseFisher:
    return spread(
        InverseFisher(
            init=lambda params: (),
            update=lambda state, params, batch, key, mask=None: state,
            multiply=lambda state, tangent, mask=None: apply_mask(_tree.widen(tangent), mask),
            diagonal=lambda state, params, mask=None: apply_mask(
                jax.tree.map(lambda x: jnp.ones(x.shape, _tree.wide_dtype(x.dtype)), params), mask
            ),
            updates=0,
        )
    )
