"""OBS scores: predicted increase of the loss when one weight is removed."""

from typing import Any

import jax

from fishleg_jax import _tree


def obs_saliency(params: Any, diagonal: Any, newton_step: Any | None = None) -> Any:
    """OBS score of every weight, `ρ = w² / (2 [F⁻¹]_ii)`.

    With an inverse Fisher of ones this is half the squared magnitude; with that of a diagonal
    Fisher it is the score of Optimal Brain Damage.

    Args:
        params: Weights, any pytree.
        diagonal: Diagonal of the inverse Fisher, a pytree of the same structure and shapes.
        newton_step: `F⁻¹ g`, for the first-order form `(w − F⁻¹g)² / (2 [F⁻¹]_ii)` (WoodTaylor);
            None takes the gradient as zero.

    Returns:
        A pytree of the same structure in float32 or better: predicted increases of the loss, in
        nats per example, when that weight alone is removed and the others make up for it as well as
        they can.

    References:
        Hassibi & Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, 1992,
        equation 5; Singh & Alistarh, WoodFisher, 2020, appendix on WoodTaylor.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.obs_saliency(jnp.array([2.0, 2.0]), jnp.array([1.0, 4.0]))
        Array([2. , 0.5], dtype=float32)
    """
    target = _tree.widen(params)
    if newton_step is not None:
        target = jax.tree.map(lambda w, step: w - step, target, newton_step)
    return jax.tree.map(lambda t, q: t**2 / (2 * q), target, _tree.widen(diagonal))
