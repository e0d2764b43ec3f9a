"""Several processes on this machine against one; see `experiments.killing_process` for more."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments import one_shot, processes
from experiments.killing_process import free_address

RUN = """
import argparse, json, pathlib, sys
import jax, numpy as np
import fishleg_jax as flj
from experiments import files, processes
from experiments.checkpointing import Checkpoints
jax.config.update("jax_disable_most_optimizations", True)
parser = argparse.ArgumentParser()
processes.add_options(parser)
parser.add_argument("--out", type=pathlib.Path)
with processes.joined(parser, None):
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    weights, inputs = rng.normal(size=(6, 4)), rng.normal(size=(48, 6))
    train = inputs.astype(np.float32), np.arange(48) % 4
    # of what is not its share a process sees NaN
    own = processes.share(24)
    for i, x in enumerate(train[:1]):
        for begin in (0, 24):
            mine = np.zeros(24, bool)
            mine[own] = True
            x[begin : begin + 24][~mine] = np.nan
    batches = [processes.read(train, np.arange(begin, begin + 24)) for begin in (0, 24)]
    params = processes.everywhere(weights.astype(np.float32))
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.categorical())
    result = flj.prune_one_shot(model, params, flj.inverse.diagonal(model), batches, sparsity=0.5)
    with Checkpoints(out / "checkpoints") as kept:
        kept.save(3, {"params": result.params})
        step, restored = kept.restore({"params": params})
    same = bool((np.asarray(restored["params"]) == np.asarray(result.params)).all())
    told = {"weights": np.asarray(result.params).tolist(), "restored": same and step == 3,
            "processes": jax.process_count()}
    files.write_json(out / f"by{jax.process_index()}.json", told)
    print("only once")
"""


def run(out, number):
    given = [[]]
    if number > 1:
        shared = ["--coordinator", free_address(), "--processes", str(number)]
        given = [[*shared, "--process-id", str(i)] for i in range(number)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, "--out", str(out), *own],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in given
    ]
    printed = [process.communicate(timeout=240) for process in started]
    for process, (_, error) in zip(started, printed, strict=True):
        assert process.returncode == 0, error[-3000:]
    # what gloo itself prints is none of ours
    lines = [[x for x in out.splitlines() if "[Gloo]" not in x] for out, _ in printed]
    assert lines == [["only once"]] + [[]] * (number - 1)
    assert [path.name for path in out.glob("*.json")] == ["by0.json"]
    return json.loads((out / "by0.json").read_text())


def test_two_processes_are_as_one(tmp_path):
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["restored"] and two["restored"]
    weights = [np.array(x["weights"]) for x in (one, two)]
    np.testing.assert_array_equal(weights[0] == 0, weights[1] == 0)
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "2"], "need --coordinator"),
        (["--coordinator", "localhost:1"], "needs --processes N"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process-id", "2"], "got 2 and 2"),
        (["--heartbeat", "0"], "at least 1 second"),
    ],
)
def test_bad_arguments(refuses, arguments, message):
    refuses(one_shot.main, arguments, message)


def test_one_process_is_the_default():
    parser = argparse.ArgumentParser()
    processes.add_options(parser)
    with processes.joined(parser, []):
        assert processes.is_first() and not processes.several()
        assert processes.share(7) == slice(7)
