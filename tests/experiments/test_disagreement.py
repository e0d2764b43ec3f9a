"""Who loses by pruning: the ensemble, a short run, and that it goes on."""

import json

import numpy as np
import pytest

from experiments.data import datasets
from experiments.disagreement import __main__ as disagreement
from experiments.disagreement import ensemble


@pytest.fixture(scope="module")
def few_digits():
    """A fifth of the digits."""
    train, test = datasets.digits()
    return datasets.Data(tuple(x[:256] for x in train), tuple(x[:100] for x in test))


@pytest.fixture
def run(few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load", lambda *_: few_digits)
    digits = disagreement.DIGITS._replace(epochs=5)
    monkeypatch.setitem(disagreement.SPECS, "digits", digits)

    def main(method):
        short = ["--subsets", "4", "--epochs", "2", "--examples", "64", "--sparsity", "0.8"]
        out = tmp_path / "out"
        assert disagreement.main([*short, "--method", method, "--out", str(out)]) == 0
        return json.loads((out / "results.json").read_text()), capsys.readouterr().out

    return main


def test_a_run_counts_mismatches_and_goes_on(run, tmp_path):
    rows, said = run("magnitude")
    (row,) = rows
    assert row["method"] == "magnitude" and 0 < row["mismatches"] <= 100
    assert len(row["where"]) == row["mismatches"] and len(row["predicted"]) == len(row["where"])
    assert row["lost"] - row["gained"] == round(row["dense_accuracy"] - row["accuracy"])
    assert len(row["where_lost"]) == row["lost"] and set(row["where_lost"]) <= set(row["where"])
    assert sum(group[2] for group in row["by_memorisation"]) == 256
    for name in ("lost.png", "rates.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "magnitude" in said and "calibration error" in said
    before = sorted((tmp_path / "out" / "subsets").iterdir())
    assert len(before) == 4
    kept, _ = run("magnitude")
    assert kept == rows


def test_labels_are_set_beside_the_teacher():
    row = {"seed": 0, "test_examples": 200}
    rows = [
        {**row, "method": "fishleg", "where": list(range(10))},
        {**row, "method": f"fishleg{disagreement.FREE}", "where": list(range(4))},
    ]
    text = disagreement.against_labels(rows)
    assert text.startswith("fishleg, label-free: -3.0 (-5.4 to -0.6) points")
    assert disagreement.against_labels(rows[:1]) == ""


def test_subsets_have_seven_in_ten_and_differ():
    one, other = ensemble.subset(100, 0), ensemble.subset(100, 1)
    assert one.sum() == other.sum() == 70
    assert 30 < (one & other).sum() < 65
    np.testing.assert_array_equal(one, ensemble.subset(100, 0))


def test_bad_arguments_are_refused(refuses):
    refuses(disagreement.main, ["--method", "magnitude;none"], "'none' is not one of")
    refuses(disagreement.main, ["--sparsity", "1"], "not a sparsity")
