"""The experiment in two processes on this machine against one, which reads every photo."""

import json

import numpy as np
import pytest

from experiments.imagenet import __main__ as imagenet
from experiments.imagenet import photos
from tests import programs
from tests.experiments import small_imagenet as small

pytestmark = pytest.mark.slow

RUN = """
import json, sys
from experiments.imagenet import __main__ as imagenet
from experiments.imagenet import photos as imagenet_data
from tests.experiments import small_imagenet as small
read, rows = imagenet_data.Photos.read, []
def counted(self, chosen):
    rows.append(len(chosen))
    return read(self, chosen)
imagenet_data.Photos.read = counted
code = imagenet.main(sys.argv[1:], small.NETWORK, small.load)
print(f"read {sum(rows)}", file=sys.stderr)
sys.exit(code)
"""
SETTINGS = {
    "calibration": 16,
    "held-out": 8,
    "gradients": 8,
    "batch": 8,
    "solve": 8,
    "kfac-mean": 2,
    "iterations": 2,
    "chunk": 6,
    "method": "kfac",
    "damping": 1,
    "solve-damping": 1,
    "sparsity": 0.75,
}
ARGUMENTS = [f"--{name}={value}" for name, value in SETTINGS.items()]


def alone(out, shared, monkeypatch):
    """Results and rows read by the experiment in this process."""
    read, rows = photos.Photos.read, []
    monkeypatch.setenv("FISHLEG_SHARED", str(shared))
    monkeypatch.setattr(
        photos.Photos, "read", lambda self, chosen: rows.append(len(chosen)) or read(self, chosen)
    )
    assert imagenet.main([*ARGUMENTS, "--out", str(out)], small.NETWORK, small.load) == 0
    return json.loads((out / "results.json").read_text()), sum(rows)


def run(out, shared, number):
    program = ["-c", RUN, *ARGUMENTS, "--out", str(out)]
    told = programs.together(program, number, timeout=240, FISHLEG_SHARED=str(shared))
    read = [int(error.rpartition("read ")[2]) for _, error in told]
    return json.loads((out / "results.json").read_text()), read


def test_two_processes_read_half_each_and_give_what_one_gives(tmp_path, monkeypatch):
    small.write_shared(tmp_path / "shared")
    one, whole = alone(tmp_path / "one", tmp_path / "shared", monkeypatch)
    two, halves = run(tmp_path / "two", tmp_path / "shared", 2)
    assert halves == [whole // 2] * 2
    assert len(one) == len(two) == 3  # the dense network, and two compensations
    for a, b in zip(one, two, strict=True):
        assert a["method"] == b["method"] and a.get("sparsity") == b.get("sparsity")
        assert a["ranks"] == b["ranks"] and a["recalibrated_ranks"] == b["recalibrated_ranks"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
