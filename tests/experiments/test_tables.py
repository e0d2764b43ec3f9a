"""Tables and files."""

import json

import pytest

from experiments.report import tables
from experiments.running import files


def result(method, target, accuracy, seed):
    return {
        "method": method,
        "sparsity_target": target,
        "accuracy": accuracy,
        "dense_accuracy": 98.0,
        "seed": seed,
    }


def over_seeds(*accuracies):
    return [result("fishleg", 0.5, accuracy, seed) for seed, accuracy in enumerate(accuracies)]


def test_table_shows_medians_over_seeds():
    results = over_seeds(90.0, 97.0, 91.0)
    assert tables.accuracies(results).splitlines() == [
        "test accuracy, %   50 %",
        "----------------  -----",
        "dense             98.00",
        "fishleg           91.00",
    ]


def test_table_shows_the_spread_and_further_columns():
    results = [*over_seeds(90.0, 97.0, 91.0), result("kfac", 0.9, 20.0, 0)]
    results[0]["accuracy"] = None
    table = tables.by_sparsity(
        results, "accuracy", "%", tables.spread, {"results": lambda own: str(len(own))}
    )
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["dense", "98.00", "98.00"],
        ["fishleg", "94.00", "(91.00–97.00)", "–", "3"],
        ["kfac", "–", "20.00", "1"],
    ]


def test_json_has_no_nan(tmp_path):
    path = files.write_json(tmp_path / "new" / "a.json", [{"loss": float("nan"), "n": 1}])
    assert json.loads(path.read_text()) == [{"loss": None, "n": 1}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def writer(beside):
        beside.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write(path, writer)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
