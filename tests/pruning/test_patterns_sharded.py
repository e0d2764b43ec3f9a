"""Patterns of weights that are sharded over devices, Auto and Explicit axes, against one device."""

import json
import os

import pytest

from tests import programs
from tests.pruning.patterns_sharded import cases

pytestmark = pytest.mark.slow
CASES = [
    f"{name}, {way}, {pattern}, {kind}"
    for name, way, kind, patterns in cases()
    for pattern in patterns
]


@pytest.fixture(scope="module")
def results():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    return json.loads(programs.told("-m", "tests.pruning.patterns_sharded", XLA_FLAGS=flags))


def test_there_are_several_devices(results):
    assert results["devices"] == 4


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_are_pruned_like_those_of_one_device(results, case):
    assert isinstance(results[case], list), results[case]  # else it is what was raised
    masks, weights, placed = results[case]
    assert masks == 0 and placed
    assert weights == 0 if "one_shot" in case else weights < 1e-12
