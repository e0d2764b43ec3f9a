"""Fixtures for all tests and doctests, and how their models are compiled."""

import gc
import os
from pathlib import Path

import jax
import pytest

from tests import quick

# before jax looks for devices
os.environ["XLA_FLAGS"] = f"{quick.FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
quick.prepare()

MAPS = 30_000  # of the 65,530 areas of memory that Linux grants a process by default


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forgets compiled programs before their memory areas run out.

    XLA's compiler for the CPU takes a few for each program, and ends the process with a
    segmentation fault once there are no more: after some thousand programs.
    """
    yield
    try:
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return
    if maps > MAPS:
        quick.forget_programs()
        gc.collect()


def pytest_sessionfinish():
    """Lets a worker end at once, or xdist interrupts it after five seconds, which it prints.

    pytest then collects garbage, and would go through all that JAX keeps.
    """
    gc.freeze()


# modules that run for longer than they compile
FULL_OPTIMISATION = ("test_checkpoints", "test_end_to_end_digits")


@pytest.fixture(autouse=True, scope="module")
def full_optimisation(request):
    """All optimisations, for the modules that need them."""
    needed = request.module.__name__.endswith(FULL_OPTIMISATION)
    jax.config.update("jax_disable_most_optimizations", not needed)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """The random key that a test starts from."""
    return jax.random.key(0)
