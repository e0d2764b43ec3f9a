"""Scripts that remove units, and that prune to patterns: a small run, gone on with, refusals."""

import json

import jax
import pytest

import fishleg_jax as flj
from experiments.data import datasets
from experiments.deploy import finetune
from experiments.models import checkpoints, networks, training
from experiments.models.specs import MODELS, make_spec
from experiments.one_shot import patterns
from fishleg_jax.compaction import choice

SPEC = make_spec(
    "small",
    networks.Mlp((16, 10)),
    "digits",
    (8, 8, 1),
    epochs=1,
    train_batch=256,
    examples=64,
    batch=32,
)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Random weights of a small network that the scripts know by name."""
    monkeypatch.setitem(MODELS, SPEC.name, SPEC)
    path = tmp_path / "small.npz"
    checkpoints.save(path, *SPEC.init(jax.random.key(0)))
    return path


class FastClock:
    """Any smaller network takes half of the time."""

    whole = 1.0

    def __init__(self, network, inputs):
        pass

    def share(self, network):
        return 0.5


@pytest.mark.slow
def test_units_are_removed_and_the_rest_is_trained(checkpoint, tmp_path, capsys, monkeypatch):
    command = ["--network", "small", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "o")]
    small = ["--examples", "64", "--seconds", "0.001", "--epochs", "1", "--share", "0.55"]
    assert finetune.main([*command, *small]) == 0
    rows = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["magnitude", "auto"]
    for row in rows:
        assert 0.5 < row["share"] < 0.55
        assert row["finetuned_loss"] < row["loss"]
        kept = flj.export.load_params(
            tmp_path / "o" / f"small_0.55_{row['chosen']}_seed0.safetensors"
        )
        shapes = {x.shape for x in jax.tree.leaves(kept.params["params"])}
        assert shapes == {(64, 8), (8,), (8, 10), (10,)}
    first = capsys.readouterr().out
    assert finetune.main([*command, *small]) == 0
    again = capsys.readouterr().out
    assert "seed 0" in first and "seed 0" not in again  # nothing is made twice
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == rows
    monkeypatch.setattr(choice, "Clock", FastClock)
    both = ["--method", "magnitude", "--time-share", "0.9"]
    assert finetune.main([*command, *small, *both]) == 0
    last = json.loads((tmp_path / "o" / "results.json").read_text())[-1]
    assert last == rows[0] | {
        "settings": rows[0]["settings"] | {"time_share": 0.9},
        **{name: last[name] for name in ("finetune_cpu_seconds", "weights") if name in last},
    }


def test_a_time_beside_a_time_is_refused(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--goal", "time", "--time-share", "0.5"])
    assert "leave out --goal time" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_stay_make_up_for_the_units_that_go(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, SPEC.name, SPEC._replace(epochs=30, train_batch=32))
    network = ["--network", "small", "--checkpoint", str(tmp_path / "trained.npz")]
    spec = MODELS[SPEC.name]
    data = datasets.load(spec.dataset)
    checkpoints.save(tmp_path / "trained.npz", *training.train(spec, data.train))
    options = ["--examples", "256", "--seconds", "0.001", "--epochs", "0", "--share", "0.55"]
    methods = ["magnitude", "magnitude+group", "obs", "obs+group", "dense"]
    options += ["--method", ",".join(methods), "--out", str(tmp_path / "o")]
    assert finetune.main([*network, *options]) == 0
    rows = json.loads((tmp_path / "o" / "results.json").read_text())
    losses = {row["method"]: row["loss"] for row in rows}
    for scores in ("magnitude", "obs"):
        assert losses["dense"] < losses[f"{scores}+group"] < 0.7 * losses[scores]


@pytest.mark.slow
def test_patterns_are_compared_and_kept(checkpoint, tmp_path, capsys):
    command = ["--model", "small", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "o")]
    command += ["--examples", "64", "--method", "magnitude,obd,obd+group"]
    assert patterns.main(command) == 0
    rows = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["magnitude", "obd", "obd+group"]
    assert {row["sparsity"] for row in rows} == {0.5}
    table = capsys.readouterr().out
    assert f"{rows[2]['loss']:.4f}" in table and "accuracy, %" in table
    assert patterns.main([*command, "--seed", "0,1"]) == 0
    both = json.loads((tmp_path / "o" / "results.json").read_text())
    assert both[:3] == rows and {row["seed"] for row in both[3:]} == {1}


def test_bad_arguments_are_refused(refuses):
    refuses(finetune.main, ["--share", "0"], "'0' is not a share in (0, 1]")
    refuses(finetune.main, ["--time-share", "50"], "'50' is not a share in (0, 1]")
    refuses(finetune.main, ["--method", "auto+group"], "'auto+group' is not one of")
    refuses(finetune.main, ["--examples", "1297"], "leaves no training example for auto")
    refuses(patterns.main, ["--method", "group"], "group")
