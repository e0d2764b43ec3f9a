"""Programs in processes of their own: how many devices there are is settled when jax starts."""

import os
import subprocess
import sys
from pathlib import Path

from experiments.killing_process import memberships
from tests import quick


def cache(folder: Path) -> dict[str, str]:
    """Environment in which processes read what others before them have compiled.

    Args:
        folder: folder of the compiled programs.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def told(*arguments: str, **environment: str) -> str:
    """What a program of this Python prints, once it has ended well.

    Args:
        *arguments: `-m MODULE` or `-c CODE`, and its arguments.
        **environment: variables beside those that are set, and in place of `XLA_FLAGS`, of `quick`.
    """
    [(printed, _)] = together(arguments, 1, **environment)
    return printed


def together(
    arguments: list[str], number: int, timeout: float | None = None, **environment: str
) -> list[tuple[str, str]]:
    """What each of some processes prints that share a run, and what of errors, see `told`.

    Args:
        arguments: see `told`, without those that join processes.
        number: how many processes.
        timeout: seconds for each.
        **environment: see `told`.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.quick", *arguments, *own],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.FLAGS} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in memberships(number)
    ]
    printed = [process.communicate(timeout=timeout) for process in started]
    for process, (_, error) in zip(started, printed, strict=True):
        assert process.returncode == 0, error[-5000:]
    return printed
