"""DCT coefficients beside weights: equal counts, one training, results that are kept."""

import json

import pytest

from experiments.bases import __main__ as bases
from experiments.bases import networks
from experiments.data import datasets


@pytest.mark.slow
def test_magnitude_of_both_bases_at_equal_counts(tmp_path, monkeypatch, capsys):
    quick = networks.NETWORKS["cnn"]._replace(epochs=1)
    monkeypatch.setitem(networks.NETWORKS, "cnn", quick)
    train, test = datasets.digits()
    few = datasets.Data(tuple(x[:256] for x in train), tuple(x[:100] for x in test))
    monkeypatch.setattr(datasets, "load", lambda *_: few)
    arguments = [
        "--networks",
        "cnn",
        "--modes",
        "one_shot,dynamic",
        "--methods",
        "magnitude",
        "--seeds",
        "0",
    ]
    arguments += ["--bases", "space,dct_bands", "--densities", "0.2", "--dynamic-densities", "0.2"]
    arguments += ["--examples", "128", "--epochs", "1", "--out", str(tmp_path)]
    assert bases.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in rows] == ["one_shot"] * 2 + ["dynamic"] * 2
    kernels = 3 * 3 * 1 * 16 + 3 * 3 * 16 * 32
    wanted = 1 - int(0.8 * kernels) / kernels
    assert all(abs(row["kept"] - wanted) < 1e-6 for row in rows)
    assert (tmp_path / "bases.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "magnitude, dct_bands" in shown and "20 % kept" in shown
    # the same command takes what is there
    monkeypatch.setattr(bases.pruning, "pruned", None)
    assert bases.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == rows


@pytest.mark.slow
def test_the_librarys_own_choice(tmp_path, monkeypatch):
    quick = networks.NETWORKS["cnn"]._replace(epochs=10)
    monkeypatch.setitem(networks.NETWORKS, "cnn", quick)
    arguments = ["--networks", "cnn", "--methods", "magnitude,fishleg_default"]
    arguments += ["--densities", "0.1", "--examples", "256", "--out", str(tmp_path)]
    assert bases.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    losses = {(r["settings"]["basis"], r["settings"]["method"]): r["loss"] for r in rows}
    for basis in bases.pruning.BASES:
        assert losses[basis, "fishleg_default"] < losses[basis, "magnitude"]
    assert len(set(losses.values())) == 6
    assert {round(row["kept"], 2) for row in rows} == {0.1}


def test_refusals(refuses, tmp_path):
    out = ["--out", str(tmp_path / "new")]
    refuses(bases.main, [*out, "--densities", "0"], "a density must be in (0, 1], got 0")
    default = ["--methods", "fishleg_default", "--modes", "one_shot,dynamic"]
    refuses(bases.main, [*out, *default], "fishleg_default is for one shot")
    refuses(bases.main, [*out, "--bases", "wavelet"], "'wavelet' is not one of space, dct")
