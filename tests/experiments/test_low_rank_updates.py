"""Adam in subspaces beside Adam: results that are kept, bytes, refusals."""

import json

import pytest

from experiments.low_rank import updates
from experiments.models.specs import MODELS


@pytest.fixture
def arguments(tmp_path):
    found = ["--ranks", "0.1", "--refreshes", "5", "--directions", "3", "--rates", "2e-3"]
    return [*found, "--epochs", "2", "--trial-steps", "8", "--out", str(tmp_path)]


def test_one_round(arguments, tmp_path, monkeypatch, capsys):
    assert updates.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    trained = {row["optimizer"]: row for row in rows if row["kind"] == "training"}
    weights = 64 * 128 + 128 * 64 + 64 * 10 + 128 + 64 + 10
    adam = trained.pop("adam")
    assert adam["state_bytes"] == 4 * (2 * weights + 2)  # and the numbers of steps
    low, plain, within = trained.values()
    assert low["state_bytes"] == plain["state_bytes"] < adam["state_bytes"] / 4
    assert within["state_bytes"] > 4 * 3 * weights
    assert len({row["steps"] for row in (adam, low, plain, within)}) == 1
    assert all(row["train_loss"] < 2.3 for row in (adam, low, within))
    assert (tmp_path / "updates.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "low rank 10 %, refreshed every 5, without the rest" in shown and "2e-3" not in shown
    monkeypatch.setattr(updates.Contest, "program", None)  # everything is kept
    assert updates.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_refusals(refuses, tmp_path):
    out = ["--out", str(tmp_path / "new")]
    refuses(updates.main, [*out, "--ranks", "1"], "--ranks must be shares between 0 and 1")
    refuses(updates.main, [*out, "--network", "faces"], "invalid choice: 'faces'")
    assert MODELS["mlp"].name in updates.NETWORKS
