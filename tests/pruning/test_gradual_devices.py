"""Gradual pruning inside `shard_map` and `pmap`, against one device that has the whole batches."""

import json
import os
import subprocess
import sys

import pytest

from tests.pruning.devices import CASES, DEVICES, IN_PMAP, OVER_TWO_AXES, SPARSITY

RUNS = [f"{name} in shard_map" for name in CASES]
RUNS += [f"{name} in pmap" for name in IN_PMAP]
RUNS += [f"{name} in shard_map over two axes" for name in OVER_TWO_AXES]


@pytest.fixture(scope="module")
def results():
    """What `tests.pruning.devices` tells, which has several devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    run = subprocess.run(
        [sys.executable, "-m", "tests.pruning.devices"],
        env={"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_there_are_several_devices(results):
    assert results.pop("devices") == DEVICES
    assert sorted(results) == sorted(RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_devices_with_parts_of_a_batch_are_as_one_with_all_of_it(results, run):
    found = results[run]
    assert isinstance(found, dict), found  # else it is what was raised
    assert found["masks"] == 0
    assert found["params"] < 1e-9 and found["state"] < 1e-9
    assert found["ok"] and found["sparsity"] == SPARSITY and found["different_masks"] > 3
