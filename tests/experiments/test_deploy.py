"""What pruning pays: every path gives the pruned network's outputs, and all are timed in turn."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.deploy import __main__ as deploy
from experiments.deploy import measuring, paths, subjects
from tests.marks import some_slow

ONNX = ("dense, onnxruntime", "zeros, onnxruntime", "fewer units, onnxruntime")
WITHOUT_ONNX = {name: make for name, make in paths.PATHS.items() if name not in ONNX}


@pytest.fixture(scope="module")
def subject():
    """Half of the weights are pruned; labels are those of the pruned network, but for the first."""
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4)), "b": jnp.arange(4.0)}
    masks = {"w": jnp.arange(24).reshape(6, 4) % 2 == 0, "b": jnp.ones(4, bool)}
    predict = lambda params, x: jnp.tanh(x) @ params["w"] + params["b"]
    pruned = flj.apply_masks(params, masks)
    inputs = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    labels = np.asarray(predict(pruned, inputs).argmax(axis=-1))
    labels = np.where(np.arange(10) == 0, (labels + 1) % 4, labels)
    return subjects.Subject(
        "digits",
        *(predict, predict, params, pruned, masks, 0.5, (inputs, labels)),
        *(predict, pruned, 0.5),
    )


@pytest.mark.parametrize(
    "name",
    some_slow(paths.PATHS, lambda name: name in ONNX),
)
def test_every_path_gives_the_same_outputs(subject, tmp_path, name):
    ready = paths.PATHS[name](subject, tmp_path / "net", 4)
    params = subject.dense_params if name.startswith("dense") else subject.params
    inputs = subject.test[0][:4]
    outputs = ready.run(inputs)
    assert isinstance(outputs, np.ndarray)
    np.testing.assert_allclose(outputs, subject.pruned(params, inputs), atol=1e-5)
    assert ready.file is None or ready.file.stat().st_size > 0


def test_a_run_writes_its_results(subject, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subjects, "make", lambda name, **_: subject._replace(name=name))
    monkeypatch.setattr(measuring, "PATHS", WITHOUT_ONNX)
    monkeypatch.setattr(measuring, "SHORTEST", 1e-6)
    out = tmp_path / "out"
    arguments = ["--network", "digits", "--seconds", "0.001", "--out", str(out)]
    assert deploy.main(arguments) == 0
    rows = {row["path"]: row for row in json.loads((out / "results.json").read_text())}
    assert list(rows) == list(WITHOUT_ONNX)
    for name, row in rows.items():
        assert row["accuracy"] == 90 or name == paths.BASE
        assert row["ms_1"] > 0 and row["ms_128"] > 0 and row["ratio_128"] > 0
    assert rows[paths.BASE]["ratio_1"] == 1 and rows[paths.BASE]["bytes_ratio"] == 1
    assert rows["zeros, BCSR where it pays"]["bytes"] is None
    assert (out / "accuracy_vs_ms.png").stat().st_size > 1000
    assert "zeros, packed, XLA" in capsys.readouterr().out


@pytest.mark.parametrize("pays", [True, False])
def test_the_table_names_the_layers_that_became_sparse(subject, tmp_path, monkeypatch, pays):
    times = flj.export.MatmulTimes(2e-6, 1e-6 if pays else 3e-6)
    table = {((6, 4), 0.5, batch): times for batch in measuring.BATCHES}
    apply = functools.partial(flj.export.sparse_apply, measure=table)
    monkeypatch.setattr(flj.export, "sparse_apply", apply)
    both = {name: paths.PATHS[name] for name in (paths.BASE, paths.BCSR)}
    monkeypatch.setattr(measuring, "PATHS", both)
    rows = measuring.measure(subject, 0.001, tmp_path)
    args = deploy._parser().parse_args(["--network", "digits"])
    name = "w" if pays else "none"
    kernels = [f"digits at batch {batch}, sparse: {name}" for batch in measuring.BATCHES]
    sentence = f" Kernels in the rows with BCSR: {'; '.join(kernels)}."
    assert deploy.table(rows, args).note.endswith(sentence)
    assert "BCSR" not in deploy.table(rows[:1], args).note


def test_paths_are_timed_in_turn_behind_different_ones_and_warm(monkeypatch):
    order, names = [], (paths.BASE, "b", "c")
    runs = {name: lambda x, name=name: order.append((name, len(x))) for name in names}
    monkeypatch.setattr(measuring, "_seconds", lambda run, x, calls: run(x) or 1.0)
    times = measuring.in_turn(runs, np.ones(3), seconds=1e-9)
    assert {len(found) for found in times.values()} == {measuring.FEWEST}
    assert {size for _, size in order} == {3}
    called = [name for name, _ in order[len(names) * 4 :]]  # behind compilations
    rounds = np.reshape(called, (measuring.FEWEST, len(names), 2))
    assert (rounds[..., 0] == rounds[..., 1]).all()  # one call to warm up, one that counts
    assert all(sorted(one) == sorted(names) for one in rounds[..., 0].tolist())
    assert len({tuple(one) for one in rounds[..., 0].tolist()}) > 1


@pytest.mark.parametrize("batch", [3, 10, 16])
def test_the_accuracy_counts_every_example_once(subject, batch):
    run = lambda inputs: np.asarray(subject.pruned(subject.params, inputs))
    assert measuring.accuracy(run, subject, batch) == 90


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--network", "mnist"], "'mnist' is not one of digits, resnet20"),
        (["--sparsity", "1"], "'1' is not a sparsity in [0, 1)"),
        (["--seconds", "0"], "'0' is not a positive number"),
        (["--method", "luck"], "invalid choice"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(deploy.main, [*arguments, "--out", "out"], message)
