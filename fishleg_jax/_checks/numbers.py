"""Checks of single arguments, a number, a flag or a function, before anything is compiled."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_number(x: Any) -> bool:
    """Whether it is a real number, or an array of one that can be looked at; no boolean is."""
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        if isinstance(x, jax.core.Tracer) or np.ndim(x) != 0:
            return False
        return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_whole(x: Any, least: int) -> bool:
    """Whether it is of a type of whole numbers, and not below another."""
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        return is_number(x) and jnp.issubdtype(x.dtype, jnp.integer) and int(x) >= least
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= least


def check_number(value: Any, name: str, valid: Callable[[float], bool], expected: str) -> float:
    """A number in its range, or a ValueError.

    Args:
        value: what was given.
        name: the name of the argument.
        valid: whether a number is in its range.
        expected: the range in words.
    """
    if not is_number(value) or not valid(float(value)):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def check_positive(value: Any, name: str, or_none: str = "") -> float:
    """A positive finite number, or a ValueError."""
    expected = f"a positive finite number{or_none}"
    return check_number(value, name, lambda x: 0 < x < math.inf, expected)


def check_not_negative(value: Any, name: str, or_none: str = "") -> float:
    """A finite number of at least 0, or a ValueError."""
    expected = f"a finite number of at least 0{or_none}"
    return check_number(value, name, lambda x: 0 <= x < math.inf, expected)


def check_tolerance(value: Any, name: str = "tolerance") -> float:
    """A number in [0, 1), or a ValueError."""
    return check_number(value, name, lambda x: 0 <= x < 1, "in [0, 1)")


def check_count(value: Any, name: str, least: int = 1, or_none: str = "") -> int:
    """A whole number of at least `least`, or a ValueError."""
    if not is_whole(value, least):
        expected = f"a whole number of at least {least}{or_none}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def check_flag(value: Any, name: str) -> bool:
    """True or False, or a ValueError."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_function(value: Any, name: str, arguments: int, expected: str) -> None:
    """Raises a ValueError unless a value can be called with so many arguments by position."""
    fits = callable(value)
    try:
        # what a decorator wraps may take others than the function that is called
        fits and inspect.signature(value, follow_wrapped=False).bind(*range(arguments))
    except TypeError:
        fits = False
    except ValueError:  # one that is written in C may have no signature
        pass
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
