"""The clock of the benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(function: Callable[[], Any]) -> float:
    """Seconds of a call, until its result is ready."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin
