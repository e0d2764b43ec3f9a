"""Pruning in stages that can be stopped between any two, on a tiny network."""

import json

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.imagenet import __main__ as imagenet
from experiments.imagenet import in_stages
from tests.experiments import small_imagenet as small
from tests.experiments.test_imagenet import ARGUMENTS, shared  # noqa: F401  # a fixture

STAGES = ["--stages=3", "--stage-photos=20", "--sparsity=0.75", "--method=fishleg"]


def run(out, *arguments):
    given = [*ARGUMENTS, *STAGES, "--out", str(out), *arguments]
    return imagenet.main(given, small.NETWORK, small.load)


@pytest.mark.slow
def test_stages_go_on_after_a_stop_and_are_not_made_again(tmp_path, monkeypatch, capsys):
    seen, prune = [], flj.prune_one_shot

    def stopped(model, params, estimator, batches, **how):
        seen.append((how["sparsity"], [np.asarray(b[0]) for b in batches]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return prune(model, params, estimator, batches, **how)

    monkeypatch.setattr(flj, "prune_one_shot", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--compensation=group")
    assert not (tmp_path / "results.json").exists() or len(results(tmp_path)) == 1  # dense
    assert run(tmp_path, "--compensation=group") == 0
    assert "going on after stage 2 of 3" in capsys.readouterr().out
    # the third stage was begun twice, the others once
    expected = flj.stage_sparsities(0.75, 3)
    assert [s for s, _ in seen] == [*expected, expected[-1]]
    # other photos in the second stage: 20 in turn, 16 a stage
    first, second = (np.concatenate(images) for _, images in seen[:2])
    assert {x.tobytes() for x in first} != {x.tobytes() for x in second}
    [row] = [r for r in results(tmp_path) if r["method"] == "fishleg"]
    assert row["sparsity"] == pytest.approx(0.75, abs=1e-3) and row["settings"]["stages"] == 3
    assert [s["sparsity"] for s in row["stage_numbers"]] == expected
    # nothing is left to do
    assert run(tmp_path, "--compensation=group") == 0 and len(seen) == 4


def results(out):
    return json.loads((out / "results.json").read_text())


def test_weights_come_back_and_others_are_refused(tmp_path):
    params, _ = small.load(None)
    rows = [{"sparsity": 0.5, "seconds": 1.0}]
    in_stages.write(tmp_path / "a.npz", params, rows)
    back, told = in_stages.read(tmp_path / "a.npz", params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert told == rows
    with pytest.raises(ValueError, match="another network"):
        in_stages.read(tmp_path / "a.npz", {"conv": params["conv"]})
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a zip"):
        in_stages.read(tmp_path / "a.npz", params)
