"""Tables and files."""

import json

import pytest

from experiments import files, tables


def result(method, target, accuracy):
    return {
        "method": method,
        "sparsity_target": target,
        "accuracy": accuracy,
        "dense_accuracy": 98.0,
    }


def test_table_shows_medians_over_seeds():
    results = [result("fishleg", 0.5, accuracy) for accuracy in (90.0, 97.0, 91.0)]
    assert tables.accuracies(results).splitlines() == [
        "test accuracy, %   50 %",
        "----------------  -----",
        "dense             98.00",
        "fishleg           91.00",
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
