"""Checks of single arguments (numbers, flags, functions) before anything is compiled."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text


def is_number(x: Any) -> bool:
    """Whether a value is a real number or a concrete scalar array; booleans are not."""
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        if isinstance(x, jax.core.Tracer) or np.ndim(x) != 0:
            return False
        return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_whole(x: Any, least: int) -> bool:
    """Whether a value has an integer type and is at least `least`."""
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        return is_number(x) and jnp.issubdtype(x.dtype, jnp.integer) and int(x) >= least
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= least


def check_number(value: Any, name: str, valid: Callable[[float], bool], expected: str) -> float:
    """Returns a valid number as a float, or raises a ValueError.

    Args:
        value: Value to check.
        name: Name of the argument in the error message.
        valid: Function `(number) -> bool`, whether a number is in range.
        expected: Description of the range for the error message.
    """
    if not is_number(value) or not valid(float(value)):
        raise ValueError(f"{name} must be {expected}, got {_text.shown(value)}")
    return float(value)


def check_positive(value: Any, name: str, or_none: str = "") -> float:
    """Returns a positive finite number, or raises a ValueError."""
    expected = f"a positive finite number{or_none}"
    return check_number(value, name, lambda x: 0 < x < math.inf, expected)


def check_not_negative(value: Any, name: str, or_none: str = "") -> float:
    """Returns a finite number of at least 0, or raises a ValueError."""
    expected = f"a finite number of at least 0{or_none}"
    return check_number(value, name, lambda x: 0 <= x < math.inf, expected)


def check_tolerance(value: Any, name: str = "tolerance") -> float:
    """Returns a number in [0, 1), or raises a ValueError."""
    return check_number(value, name, lambda x: 0 <= x < 1, "in [0, 1)")


def check_count(value: Any, name: str, least: int = 1, or_none: str = "") -> int:
    """Returns a whole number of at least `least`, or raises a ValueError."""
    if not is_whole(value, least):
        expected = f"a whole number of at least {least}{or_none}"
        raise ValueError(f"{name} must be {expected}, got {_text.shown(value)}")
    return int(value)


def check_flag(value: Any, name: str) -> bool:
    """Returns True or False, or raises a ValueError."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {_text.shown(value)}")
    return bool(value)


def check_function(value: Any, name: str, arguments: int, expected: str) -> None:
    """Raises a ValueError unless a value accepts this number of positional arguments."""
    fits = callable(value)
    try:
        # check the function itself: one wrapped by a decorator may take other arguments
        fits and inspect.signature(value, follow_wrapped=False).bind(*range(arguments))
    except TypeError:
        fits = False
    except ValueError:  # functions written in C may have no signature
        pass
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {_text.shown(value)}")


def takes_keyword(function: Any, keyword: str) -> bool:
    """Whether a function takes a keyword; True if its signature is unknown, as of one in C."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return True
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)
