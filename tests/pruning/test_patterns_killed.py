"""Ten thousand steps to a pattern: no zero comes back, and kills change no bit."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import killing
from tests import programs, quick
from tests.pruning.patterns_killed import CHUNK, PATTERNS, SIZES, STEPS

pytestmark = pytest.mark.slow
PROGRAM = ["tests.quick", "-m", "tests.pruning.patterns_killed"]
FLAGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.FLAGS}
INPUTS, HIDDEN, CLASSES = SIZES


def start(folder):
    """The trainings in a process of their own, which reads what those before it compiled."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | FLAGS | programs.cache(folder.parent / "compiled")
    return subprocess.Popen(
        [sys.executable, "-m", *PROGRAM, str(folder)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-5000:]


def arrays_of(folder):
    with np.load(folder / "final.npz") as file:
        return {name: file[name] for name in file.files}


def kill_at(folder, name, step):
    """Sends SIGKILL once there is a checkpoint of a step, and up to one chunk later."""
    process, kept = start(folder), folder / name / "checkpoints"
    try:
        while not any(x.name.isdigit() and int(x.name) >= step for x in kept.glob("*")):
            assert process.poll() is None, process.communicate()[1][-5000:]
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
    finally:
        process.kill()
        process.communicate()
    assert process.returncode < 0, "it was over before it was killed"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the trainings that were left alone, and of those that were killed twice."""
    here = tmp_path_factory.mktemp("trainings")
    finish(start(here / "unbroken"))
    # once in the training to each pattern, so that all go on in another process
    for name, part in zip(PATTERNS, (0.1, 0.5), strict=True):
        step = CHUNK * round(STEPS * random.uniform(part, part + 0.3) / CHUNK)
        kill_at(here / "killed", name, step)
    finish(start(here / "killed"))
    return here / "unbroken", here / "killed"


@pytest.mark.parametrize("name", PATTERNS)
def test_ten_thousand_steps_and_a_kill(folders, name):
    unbroken, killed = (arrays_of(folder / name) for folder in folders)

    # no zero returned in any step, and the pattern is there
    assert unbroken["regrown"] == 0 and unbroken["ok"] and unbroken["updates"] >= 10
    first, second = (unbroken[f"masks.Dense_{i}.kernel"] for i in range(2))
    if name == "n_m":  # the ninth input is left over
        assert (first[:8].reshape(-1, 4, HIDDEN).sum(axis=1) == 2).all() and first[8].all()
        assert (second.reshape(-1, 4, CLASSES).sum(axis=1) == 2).all()
    else:
        alive = first.any(axis=0)
        assert alive.sum() == 6 and (first == alive).all() and (alive == second.T).all()
    assert killing.identical(killed, unbroken)
