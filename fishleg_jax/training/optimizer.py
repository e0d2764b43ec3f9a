"""FishLeg as an optimiser: the natural gradient, weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from fishleg_jax import inverse
from fishleg_jax.model import Model
from fishleg_jax.training import checks as _checks
from fishleg_jax.training.precondition import Damping, scale_by_inverse_fisher


def scale_by_fishleg(
    model: Model,
    *,
    aux_every: int = 5,
    damping: Damping = None,
    momentum: float = 0.9,
    max_fisher_norm: float | None = None,
    grafting: str | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """FishLeg."""
    estimator = inverse.fishleg(model, samples=1, window=40, axis_name=axis_name)
    return scale_by_inverse_fisher(
        estimator,
        aux_every=aux_every,
        damping=damping,
        momentum=momentum,
        max_fisher_norm=max_fisher_norm,
        grafting=grafting,
        axis_name=axis_name,
        seed=seed,
    )


def fishleg_optimizer(
    model: Model,
    learning_rate: float | jax.Array | Callable[[jax.Array], Any],
    *,
    weight_decay: float = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """FishLeg with weight decay and a learning rate."""
    _checks.check_rate(learning_rate, weight_decay)
    return optax.chain(
        scale_by_fishleg(model, **options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
