"""Fixtures for all tests and doctests, and how their models are compiled.

Models are so small that nearly all the time of the tests is that of the compiler.
"""

import gc
import os
from pathlib import Path

import jax
import pytest

# XLA's newer generator of CPU kernels takes twice as long as the one before it.  (With all
# optimisations it is the other way around for deep networks: 12 s and 60 s for a training step of
# ResNet-20.)  Set before jax looks for devices, and only where it is known: XLA ends a program
# over an unknown flag.
if jax.__version_info__[:2] == (0, 10):
    flags = ["--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

MAPS = 20_000  # of the 65,530 areas of memory that Linux grants a process by default


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
        jax.clear_caches()
        gc.collect()


FULL_OPTIMISATION = "test_checkpoints"  # the module that runs for longer than it compiles


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Half the time to compile; small models run for so short that it is most of the time."""
    if FULL_OPTIMISATION in request.module.__name__:
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    """Double precision for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """The random key that a test starts from."""
    return jax.random.key(0)
