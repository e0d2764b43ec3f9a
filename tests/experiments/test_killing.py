"""Two kills: a run that was sent SIGKILL twice ends with the bits of one that was left alone."""

import random

import numpy as np
import pytest

from experiments import killing
from tests import programs

# quick to compile, and long enough to be killed
OPTIONS = ["--method", "diagonal", "--steps", "1000", "--checkpoint-every", "0.1"]


@pytest.mark.slow
def test_a_run_that_was_killed_twice(tmp_path, monkeypatch):
    for name, value in programs.cache(tmp_path / "compiled").items():
        monkeypatch.setenv(name, value)
    seconds = killing.run(tmp_path / "unbroken", OPTIONS)
    expected = killing.finished(tmp_path / "unbroken")
    assert sum(name.endswith(("kernel", "kernel:bits")) for name in expected) == 6  # with masks
    moments = [random.uniform(0.1, 0.4) * seconds, random.uniform(0, 0.2) * seconds]
    out = tmp_path / "killed"
    killed = [killing.run(out, OPTIONS, kill_after=moment) is None for moment in moments]
    assert any(killed), f"over before it was killed after {moments} of {seconds} s"
    killing.run(out, OPTIONS)
    assert killing.identical(killing.finished(out), expected), moments


def test_one_bit_is_a_difference():
    arrays = {"w": np.zeros(3, np.float32)}
    assert killing.identical(arrays, {"w": np.zeros(3, np.float32)})
    assert not killing.identical(arrays, {"w": np.array([0, 0, -0.0], np.float32)})
    assert not killing.identical(arrays, {"w": np.zeros(3)})
    assert not killing.identical({}, {})
