"""Fixtures for all tests."""

import jax
import pytest

# modules that run for longer
FULL_OPTIMISATION = ("test_checkpoints", "test_training", "test_end_to_end_digits")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Half the time to compile; small models run for so short that it is most of the time."""
    if any(part in request.module.__name__ for part in FULL_OPTIMISATION):
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
    return jax.random.key(0)
