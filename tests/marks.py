"""Marks of parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some_slow(values: Iterable[Any], slow: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test; those for which `slow` is true are for slow tests.

    Args:
        values: Parameters; a tuple holds one for each argument.
        slow: Function of a parameter or a tuple.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[pytest.mark.slow] * bool(slow(value)),
        )
        for value in values
    ]
