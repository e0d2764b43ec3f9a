"""What benchmarks measure time by."""

import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes, until its result is there."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin
