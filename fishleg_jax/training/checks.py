"""Checks of the optimiser's arguments, before anything is compiled."""

import math
from typing import Any

from fishleg_jax import _text
from fishleg_jax._checks import numbers
from fishleg_jax._devices import axis
from fishleg_jax.inverse.base import check_estimator
from fishleg_jax.pruning.gradual import checks as _gradual_checks

NO_MASKED = "put frozen arrays into the batch's constants, or set their updates to zero"
ADAPTIVE = "adaptive"
GRAFTS = (None, "sgd", "adam")


def check_arguments(
    estimator: Any,
    aux_every: Any,
    damping: Any,
    momentum: Any,
    max_fisher_norm: Any,
    grafting: Any,
    axis_name: Any,
    seed: Any,
) -> None:
    """Raises a ValueError for an argument of `scale_by_inverse_fisher` out of its range."""
    check_estimator(estimator)
    if not (_gradual_checks.is_array(aux_every) or numbers.is_whole(aux_every, 1)):
        raise ValueError(
            f"aux_every must be a whole number of steps, at least 1, got {_text.shown(aux_every)}"
        )
    if isinstance(damping, str):
        if damping != ADAPTIVE:
            raise ValueError(
                "damping must be None, a positive number, a function of the step or 'adaptive', "
                f"got {_text.shown(damping)}"
            )
    elif callable(damping):
        _gradual_checks.check_schedule(damping, "damping")
    elif damping is not None and not _gradual_checks.is_array(damping):
        numbers.check_positive(damping, "damping", ", a function of the step, 'adaptive' or None")
    if not _gradual_checks.is_array(momentum):
        numbers.check_number(momentum, "momentum", lambda x: 0 <= x < 1, "a number in [0, 1)")
    if callable(max_fisher_norm):
        _gradual_checks.check_schedule(max_fisher_norm, "max_fisher_norm")
    else:
        check_norm(max_fisher_norm)
    if grafting not in GRAFTS:
        raise ValueError(f"grafting must be None, 'sgd' or 'adam', got {_text.shown(grafting)}")
    axis.check_name(axis_name)
    _gradual_checks.check_seed(seed)


def check_norm(max_fisher_norm: Any) -> None:
    """Raises a ValueError for an invalid bound on the Fisher norm; None and arrays are valid."""
    if max_fisher_norm is not None and not _gradual_checks.is_array(max_fisher_norm):
        numbers.check_positive(max_fisher_norm, "max_fisher_norm", " or None")


def check_rate(learning_rate: Any, weight_decay: Any) -> None:
    """Raises a ValueError for an invalid learning rate or weight decay."""
    if callable(learning_rate):
        _gradual_checks.check_schedule(learning_rate, "learning_rate")
    elif not _gradual_checks.is_array(learning_rate):
        numbers.check_number(
            learning_rate,
            "learning_rate",
            lambda x: 0 <= x < math.inf,
            "a finite number of at least 0 or a function of the step",
        )
    if not _gradual_checks.is_array(weight_decay):
        numbers.check_not_negative(weight_decay, "weight_decay")
