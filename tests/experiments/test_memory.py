"""Peaks of memory: those of a stretch, not those of the whole run."""

import mmap
import sys
import time
import types

import jax
import pytest

from experiments.running import memory

MB = 10**6


def taken(size):
    """Memory straight from the system: what `free` gets back from numpy malloc may keep."""
    pages = mmap.mmap(-1, size)
    for i in range(0, size, mmap.PAGESIZE):
        pages[i] = 1
    return pages


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_peak_is_that_since_the_last_one():
    with memory.watch() as peak:
        large = taken(40 * MB)
        time.sleep(5 * memory.INTERVAL)
        large.close()
        kept = taken(20 * MB)
        time.sleep(5 * memory.INTERVAL)
        assert 38 * MB < peak() < 80 * MB
        assert 18 * MB < peak() < 50 * MB
        kept.close()
        peak()
        time.sleep(5 * memory.INTERVAL)
        assert peak() < 15 * MB


def test_the_device_has_its_own(monkeypatch):
    stats = {"bytes_in_use": 100, "peak_bytes_in_use": 1000}
    device = types.SimpleNamespace(memory_stats=lambda: dict(stats))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with memory.watch() as peak:
        stats["bytes_in_use"] = 300
        assert peak() == 200  # the 1000 were before
        stats["peak_bytes_in_use"] = 1100
        assert peak() == 1000
        assert peak() == 200


def test_where_nothing_is_known_nothing_is_said(monkeypatch):
    monkeypatch.setattr(memory, "in_use", lambda: None)
    with memory.watch() as peak:
        assert peak() is None


def test_a_line_of_what_was_predicted_and_measured():
    line = memory.told("fishleg", 12 * MB, 15 * MB)
    assert line == "fishleg: memory of the fit, predicted 12 MB, measured 15 MB"
    assert memory.told("kfac", MB, None).endswith("predicted 1 MB, measured unknown")
    assert memory.told("mfac", 0, 0, of="run").startswith("mfac: memory of the run, predicted 0 MB")


def test_what_is_planned_for_a_function_is_that_of_its_arguments_and_results():
    x = jax.ShapeDtypeStruct((1000,), "float32")

    def of(**options):
        compiled = jax.jit(lambda x: jax.numpy.sin(x), **options).lower(x).compile()
        return memory.planned(compiled)

    assert of() == 8000
    assert of(donate_argnums=0) == 4000
