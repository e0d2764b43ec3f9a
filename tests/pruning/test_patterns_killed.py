"""Ten thousand steps to a pattern: no zero comes back, and kills change no bit."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import killing
from tests import quick
from tests.pruning.patterns_killed import CHUNK, PATTERNS, SIZES, STEPS

pytestmark = pytest.mark.slow
PROGRAM = ["tests.quick", "-m", "tests.pruning.patterns_killed"]
FLAGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick.FLAGS,
    # what the first process has compiled serves those that follow
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
INPUTS, HIDDEN, CLASSES = SIZES


def start(folder, name):
    """The training in a process of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", *PROGRAM, str(folder), name]
    environment = (
        os.environ | FLAGS | {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    )
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-5000:]


def arrays_of(folder):
    with np.load(folder / "final.npz") as file:
        return {name: file[name] for name in file.files}


def kill_at(folder, name, step):
    """Sends SIGKILL once there is a checkpoint of a step, and up to one chunk later."""
    process, kept = start(folder, name), folder / "checkpoints"
    try:
        while not any(x.name.isdigit() and int(x.name) >= step for x in kept.glob("*")):
            assert process.poll() is None, process.communicate()[1][-5000:]
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
    finally:
        process.kill()
        process.communicate()
    assert process.returncode < 0, "it was over before it was killed"


@pytest.mark.parametrize("name", PATTERNS)
def test_ten_thousand_steps_and_two_kills(tmp_path, name):
    finish(start(tmp_path / "unbroken", name))
    expected = arrays_of(tmp_path / "unbroken")

    # no zero returned in any step, and the pattern is there
    assert expected["regrown"] == 0 and expected["ok"] and expected["updates"] >= 10
    first, second = (expected[f"masks.Dense_{i}.kernel"] for i in range(2))
    if name == "n_m":  # the ninth input is left over
        assert (first[:8].reshape(-1, 4, HIDDEN).sum(axis=1) == 2).all() and first[8].all()
        assert (second.reshape(-1, 4, CLASSES).sum(axis=1) == 2).all()
    else:
        alive = first.any(axis=0)
        assert alive.sum() == 6 and (first == alive).all() and (alive == second.T).all()

    # killed twice and started again
    killed = tmp_path / "killed"
    for part in (0.1, 0.5):
        kill_at(killed, name, CHUNK * round(STEPS * random.uniform(part, part + 0.3) / CHUNK))
    finish(start(killed, name))
    assert killing.identical(arrays_of(killed), expected)
