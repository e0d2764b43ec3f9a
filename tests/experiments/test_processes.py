"""Several processes on this machine against one; see `experiments.killing_process` for more."""

import argparse
import json
import shutil

import numpy as np
import pytest

from experiments.compare import __main__ as compare
from experiments.one_shot import __main__ as one_shot
from experiments.running import processes
from tests import programs

COMPARISON = (
    "--model mlp --examples 31 --method diagonal --compensation group --stages 2 --fresh "
    "--held-out 9 --iterations 3 --sparsity 0.9 --epochs 1 --finetune 1"
)
TIMES = ("seconds", "fit_seconds", "prune_seconds", "finetune_seconds")
MEMORY = ("peak_memory_bytes", "predicted_memory_bytes")

RUN = """
import argparse, json, pathlib, sys
import jax, numpy as np, jax.numpy as jnp
import fishleg_jax as flj
from experiments.models import cases
from experiments.running import files
from experiments.running import processes
from experiments.running.checkpointing import Checkpoints
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
    images = rng.uniform(size=(24, 32, 32, 3)).astype(np.float32)
    of_images = [processes.read((images, train[1]), np.arange(n), True) for n in (24, 23)]
    total = jax.jit(lambda x: jnp.einsum("nhwc,n,w->", x, jnp.arange(len(x)), jnp.arange(32)))
    changed = [float(total(x)) for x, _ in cases.augmented("cifar10", of_images, seed=0)]
    told = {"weights": np.asarray(result.params).tolist(), "restored": same and step == 3,
            "changed": changed, "plain": float(total(images)), "processes": jax.process_count()}
    files.write_json(out / f"by{jax.process_index()}.json", told)
    print("only once")
"""


def run(out, number):
    printed = programs.together(["-c", RUN, "--out", str(out)], number, timeout=240)
    # what gloo itself prints is none of ours
    lines = [[x for x in out.splitlines() if "[Gloo]" not in x] for out, _ in printed]
    assert lines == [["only once"]] + [[]] * (number - 1)
    assert [path.name for path in out.glob("*.json")] == ["by0.json"]
    return json.loads((out / "by0.json").read_text())


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["restored"] and two["restored"]
    weights = [np.array(x["weights"]) for x in (one, two)]
    np.testing.assert_array_equal(weights[0] == 0, weights[1] == 0)
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-5)
    # shifted and flipped as in the whole batch, one that can be dealt out to two and one that can't
    assert abs(one["changed"][0] / one["plain"] - 1) > 1e-2
    np.testing.assert_allclose(one["changed"], two["changed"], rtol=1e-5)


def close(one, two):
    """Whether two values of a `results.json` are the same up to rounding."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(close, one, two))
    return one == (pytest.approx(two, rel=1e-3) if isinstance(one, float) else two)


def complete(number, out):
    if number == 1:
        assert compare.main([*COMPARISON.split(), "--out", str(out)]) == 0
        return
    program = ["-m", "experiments.compare", *COMPARISON.split(), "--out", str(out)]
    programs.together(program, number, timeout=240)


@pytest.mark.slow
def test_a_comparison_in_two_processes_is_that_of_one(tmp_path):
    # of 31 images in two stages, and of 9, the last batches can't be dealt out to two
    complete(1, tmp_path / "one")
    [weights] = (tmp_path / "one").glob("mlp_*.npz")
    (tmp_path / "two").mkdir()
    shutil.copy(weights, tmp_path / "two")
    complete(2, tmp_path / "two")
    names = ["accuracy_vs_sparsity.png", weights.name, "results.json"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert [row["method"] for row in two] == ["diagonal"]
    for row in [*one, *two]:
        for name in (*TIMES, *MEMORY):
            del row[name]
    for mine, other in zip(one, two, strict=True):
        assert close(mine, other), (mine, other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "2"], "need --coordinator"),
        (["--coordinator", "localhost:1"], "needs --processes N"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process-id", "2"], "got 2 and 2"),
        (
            ["--coordinator", "", "--processes", "2", "--process-id", "0"],
            "HOST:PORT or auto, got ''",
        ),
        (["--heartbeat", "0"], "at least 1 second"),
    ],
)
@pytest.mark.parametrize("experiment", [one_shot, compare])
def test_bad_arguments(refuses, experiment, arguments, message):
    refuses(experiment.main, arguments, message)


def test_one_process_is_the_default():
    parser = argparse.ArgumentParser()
    processes.add_options(parser)
    with processes.joined(parser, []):
        assert processes.is_first() and not processes.several()
        assert processes.share(7) == slice(7)
