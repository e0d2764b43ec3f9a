"""Scores of weights: predicted increase of the loss when one weight is removed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import InverseFisher

# a name, or a function (params, masks, estimator, state, gradient) -> scores
Saliency = str | Callable[[Any, Any, InverseFisher, Any, Any], Any]
NAMES = ("obs", "obd", "mixture", "magnitude")


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


def obd_saliency(params: Any, fisher_diagonal: Any) -> Any:
    """OBD score of every weight, `½ w² F_ii`.

    Args:
        params: Weights, any pytree.
        fisher_diagonal: Diagonal of the undamped Fisher, a pytree of the same structure and shapes,
            such as `InverseFisher.fisher_diagonal` returns.

    Returns:
        A pytree of the same structure in float32 or better: predicted increases of the loss, in
        nats per example, when that weight alone is removed and no other moves.

    References:
        LeCun, Denker & Solla, Optimal Brain Damage, 1989, equation 5.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> flj.obd_saliency(jnp.array([2.0, 2.0]), jnp.array([1.0, 0.25]))
        Array([2. , 0.5], dtype=float32)
    """
    leaves = _tree.widen(params), _tree.widen(fisher_diagonal)
    return jax.tree.map(lambda w, f: w**2 * f / 2, *leaves)


_AT = " damping×"


def label(saliency: str, factor: float) -> str:
    """Name of scores, with the multiple of the estimate's own damping if it is another."""
    return saliency + ("" if factor == 1 else f"{_AT}{factor:g}")


def parsed(name: str) -> tuple[str, float]:
    """Scores and multiple of the damping: the inverse of `label`."""
    saliency, _, factor = name.partition(_AT)
    return saliency, float(factor or 1)


def check_saliency(saliency: Any, estimator: InverseFisher) -> None:
    """Raises a ValueError for a saliency that is unknown, or that the estimator can't give."""
    names = ("auto", *NAMES)
    if isinstance(saliency, str) and saliency in names:
        if saliency in ("obd", "mixture") and estimator.fisher_diagonal is None:
            raise ValueError(
                f"saliency={saliency!r} needs an estimator with a fisher_diagonal, got {estimator}"
            )
        return
    if isinstance(saliency, str):
        raise ValueError(f"saliency must be one of {', '.join(names)}, got {_text.shown(saliency)}")
    expected = f"one of {', '.join(names)} or a function"
    numbers.check_function(saliency, "saliency", 5, expected)


def scores_by(
    saliency: Saliency,
    estimator: InverseFisher,
    state: Any,
    params: Any,
    masks: Any,
    gradient: Any | None = None,
    unprepared: Any | None = None,
) -> Any:
    """Scores of the weights that are free to be pruned or moved.

    Args:
        saliency: Name or function; `auto` stands for `obs`.
        estimator: Estimate of the inverse Fisher.
        state: Its state, prepared for products.
        params: Weights to score.
        masks: Masks of the free weights.
        gradient: Gradient of the loss for first-order OBS scores; None for a gradient of zero.
        unprepared: State before the preparation, for the Fisher's diagonal; None if it is `state`.

    Returns:
        A pytree like the weights in float32 or better; scores of other weights are meaningless.
    """
    if callable(saliency):
        return saliency(params, masks, estimator, state, gradient)
    if saliency == "magnitude":
        return jitted(_half_squares)(params)
    obs = damage = None
    if saliency != "obd":
        step = None
        if gradient is not None:
            step = jitted(estimator.multiply)(state, gradient, masks)
        diagonal = jitted(estimator.diagonal)(state, params, masks)
        obs = jitted(_obs)(params, diagonal, masks, step)
    if saliency in ("obd", "mixture"):
        own = state if unprepared is None else unprepared
        damage = jitted(_obd)(params, jitted(estimator.fisher_diagonal)(own, params, masks))
    if saliency == "mixture":
        return jitted(_geometric_mean)(obs, damage)
    return damage if obs is None else obs


def _half_squares(params: Any) -> Any:
    return jax.tree.map(lambda w: w**2 / 2, _tree.widen(params))


def _obs(weights: Any, diagonal: Any, free: Any, step: Any | None) -> Any:
    # pruned weights have no curvature, and need no score
    safe = jax.tree.map(lambda q, m: jnp.where(m, q, 1), diagonal, free)
    return obs_saliency(weights, safe, step)


def _obd(weights: Any, diagonal: Any) -> Any:
    # an estimate from few samples may be off by rounding below zero
    return obd_saliency(weights, jax.tree.map(lambda f: jnp.maximum(f, 0), diagonal))


def _geometric_mean(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.sqrt(a) * jnp.sqrt(b), first, second)
