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
    monkeypatch.setattr(bases.pruning, "RATE", 0.05)  # so that much moves in a few steps
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
    arguments += ["--examples", "128", "--epochs", "3", "--out", str(tmp_path)]
    assert bases.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["mode"] for row in rows] == ["one_shot"] * 2 + ["dynamic"] * 2
    kernels = 3 * 3 * 1 * 16 + 3 * 3 * 16 * 32
    wanted = 1 - int(0.8 * kernels) / kernels
    assert all(abs(row["kept"] - wanted) < 1e-6 for row in rows)
    assert all(("returned" in row) == (row["mode"] == "dynamic") for row in rows)
    assert all(row["returned"] > 0 for row in rows[2:])
    for name in ("bases.png", "bases_dynamic.png"):
        assert (tmp_path / name).stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "magnitude, dct_bands" in shown and "20 % kept" in shown
    assert "came back, 20 %" in shown
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


def test_a_tenth_of_the_kept_coefficients_may_be_replaced():
    of_pruned = bases.pruning._of_pruned
    assert abs(of_pruned(0.05) * 0.95 - 0.1 * 0.05) < 1e-12
    assert of_pruned(1.0) == 0 and of_pruned(0.99) == 1


def test_the_picture_of_a_single_density_has_a_line_for_each_method(tmp_path, monkeypatch):
    drawn = {}

    def points(path, panels, **options):
        drawn.update(panels=panels, **options)
        return real(path, panels, **options)

    real = bases.points.points
    monkeypatch.setattr(bases.points, "points", points)
    rows = [
        {
            "model": "cnn",
            "accuracy": accuracy,
            "dense_accuracy": 98.0,
            "settings": {"method": method, "basis": "dct", "density": 0.05},
        }
        for method, accuracy in (("magnitude", 90.0), ("magnitude", 92.0), ("fishleg", 95.0))
    ]
    path = bases._picture(tmp_path / "one.png", rows)
    assert path.stat().st_size > 1000 and drawn["levels"] == {"cnn": 98.0}
    assert drawn["panels"]["cnn"] == {
        "magnitude, dct": {5.0: [90.0, 92.0]},
        "fishleg, dct": {5.0: [95.0]},
    }
    # with several densities there are curves
    drawn.clear()
    rows[0]["settings"]["density"] = 0.1
    assert bases._picture(tmp_path / "two.png", rows).stat().st_size > 1000 and not drawn


def test_refusals(refuses, tmp_path):
    out = ["--out", str(tmp_path / "new")]
    refuses(bases.main, [*out, "--densities", "0"], "a density must be in (0, 1], got 0")
    default = ["--methods", "fishleg_default", "--modes", "one_shot,dynamic"]
    refuses(bases.main, [*out, *default], "fishleg_default is for one shot")
    refuses(bases.main, [*out, "--bases", "wavelet"], "'wavelet' is not one of space, dct")
