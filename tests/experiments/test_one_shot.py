"""The main job, small; and what it says to bad arguments."""

import contextlib
import functools
import io
import json
import math

import numpy as np
import pytest

import fishleg_jax as flj
from experiments.one_shot import __main__ as one_shot

KEYS = {
    "method",
    "dataset",
    "model",
    "sparsity_target",
    "sparsity",
    "accuracy",
    "dense_accuracy",
    "loss",
    "dense_loss",
    "seconds",
    "curvature_examples",
    "seed",
    "settings",
}


def run(out, *options):
    """The results of a run of FishLeg and magnitude, by default."""
    arguments = "--model mlp --epochs 1 --sparsity 0.7 --updates 3 --examples 100 --batch-size 30"
    assert one_shot.main([*arguments.split(), *options, "--out", str(out)]) == 0
    return rows_of(out)


def rows_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The folder of a run, and what it printed to stdout and stderr."""
    out, stdout, stderr = tmp_path_factory.mktemp("one_shot") / "out", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        run(out)
    return out, stdout.getvalue(), stderr.getvalue()


@pytest.mark.slow  # .ci/run makes a run of its own
def test_a_small_run_writes_its_results(printed):
    out, stdout, stderr = printed
    results = rows_of(out)
    assert (out / "accuracy_vs_sparsity.png").stat().st_size > 1000
    assert [row["method"] for row in results] == ["fishleg", "magnitude"]
    assert [row["curvature_examples"] for row in results] == [90, 0]
    weights = 64 * 128 + 128 * 64 + 64 * 10
    for row in results:
        assert row.keys() == KEYS
        assert row["sparsity"] == pytest.approx(math.floor(0.7 * weights) / weights, abs=1e-12)
        assert row["settings"]["prunable_weights"] == weights
    assert "magnitude" in stdout and str(out / "results.json") in stdout
    assert stderr == ""  # no progress bars: this is no terminal


@pytest.mark.slow
def test_less_memory_changes_nothing_but_the_settings(monkeypatch, tmp_path):
    # in one stage, as lengths of stages follow measured losses and make more of every rounding
    monkeypatch.setattr(flj, "Stages", functools.partial(flj.Stages, 1))
    options = ["--remat", "2", "--examples-per-chunk", "24", "--method", "fishleg"]
    [plain] = run(tmp_path / "plain", *options[-2:])
    [bounded] = run(tmp_path / "bounded", *options)
    settings = bounded["settings"]
    # the damping is measured on Fisher samples: they are the same
    assert settings["damping"] == pytest.approx(plain["settings"]["damping"], rel=1e-5)
    # pixels that are always 0 have equal eigenvalues, whose eigenvectors turn with the rounding:
    # data that are off by the last digit move the loss as much
    assert bounded["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert settings.keys() - plain["settings"].keys() == {"remat", "examples_per_chunk"}
    assert (settings["remat"], settings["examples_per_chunk"]) == (2, 24)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--remat", "0"], "--remat: '0' is not a whole number of at least 1"),
        (["--examples-per-chunk", "1.5"], "--examples-per-chunk: '1.5' is not a whole number"),
        (["--sparsity", "0.5,1"], "'1' is not a sparsity in [0, 1)"),
        (["--sparsity", "nan"], "'nan' is not a sparsity in [0, 1)"),
        (["--sparsity", ""], "'' is not a sparsity"),
        (["--method", "fishleg,magic"], "'magic' is not one of fishleg"),
        (["--damping", "0"], "'0' is not a positive number"),
        (["--examples", "0"], "'0' is not a whole number of at least 1"),
        (["--examples", "1298"], "--examples 1298: digits has 1297"),
        (["--seed", "-1"], "'-1' is not a whole number"),
        (["--dataset", "svhn"], "invalid choice"),
        (["--dataset", "digits", "--model", "resnet20"], "use cnn, mlp"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "--data-dir nowhere has no mnist"),
        (["--data-dir", "nowhere"], "--data-dir is for mnist and cifar10"),
        (["--updates", "2"], "--updates: '2' is not a whole number of at least 3"),
        (["--checkpoint", "nowhere.npz"], "nowhere.npz does not exist"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(one_shot.main, [*arguments, "--out", "out"], message)


def test_a_checkpoint_of_the_wrong_shape_is_refused(refuses, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"fc1.weight": np.ones((3, 64), np.float32)})
    arguments = ["--model", "mlp", "--checkpoint", str(path), "--out", "out"]
    refuses(one_shot.main, arguments, "fc1.bias is missing")


def test_an_out_that_is_a_file_is_refused(refuses, tmp_path):
    (tmp_path / "out").write_text("mine")
    refuses(one_shot.main, ["--out", "out"], "can't be written")
