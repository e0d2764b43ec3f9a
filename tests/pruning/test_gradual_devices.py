"""Gradual pruning inside `shard_map` and `pmap`, against one device that has the whole batches."""

import json
import os

import pytest

from tests import programs
from tests.pruning.devices import CASES, DEVICES, IN_PMAP, OVER_TWO_AXES, SPARSITY

pytestmark = pytest.mark.slow

RUNS = [f"{name} in shard_map" for name in CASES]
RUNS += [f"{name} in pmap" for name in IN_PMAP]
RUNS += [f"{name} in shard_map over two axes" for name in OVER_TWO_AXES]


@pytest.fixture(scope="module")
def results():
    """What `tests.pruning.devices` tells, which has several devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    return json.loads(programs.told("-m", "tests.pruning.devices", XLA_FLAGS=flags))


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
