"""Tables are kept with their command, commit and date, and a page can be made from them."""

import json
import os
import subprocess

import pytest

from experiments import pages
from experiments.report import record

TABLE = record.Table(
    title="a table",
    columns=["", "loss"],
    rows=[["dense", 1.0], ["pruned", [2.001, 1.5, 2.5]], ["none", None]],
    decimals=[0, 2],
    seed="0, 1",
    data="digits",
    examples="64",
)


def test_a_kept_table_makes_a_page(tmp_path):
    argv = ["--seed", "0,1", "--record", "some", "--out", "here", "--data-dir", "a folder"]
    record.keep("some", TABLE, "experiments.one", argv, tmp_path)
    kept = json.loads((tmp_path / "docs" / "results" / "some.json").read_text())
    assert kept["command"] == ["python -m experiments.one --seed 0,1 --data-dir 'a folder'"]
    assert kept["commit"] == "unknown"  # no repository
    assert kept["machine"].startswith(f"{os.cpu_count()} CPU cores")
    assert kept["rows"][1] == ["pruned", [2.0, 1.5, 2.5]]  # rounded as it is shown
    page = pages.render("some", tmp_path)
    assert "| pruned | 2.00 (1.50–2.50) |" in page and "| none | |" in page


def test_nothing_is_kept_without_a_name(tmp_path):
    record.keep(None, TABLE, "experiments.one", [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_accuracies_over_sparsities_and_seeds_are_kept(tmp_path):
    """Batch norm as stored and recomputed, each in a file of its own."""
    rows = [
        {
            "model": "resnet20",
            "dataset": "cifar10",
            "method": method,
            "sparsity_target": sparsity,
            "seed": seed,
            "accuracy": 50.0 + seed,
            "dense_accuracy": 90.0,
            "recalibrated_accuracy": 60.0,
            "recalibrated_on": 64,
            "curvature_examples": 64 if method == "fishleg" else 0,
        }
        for method in ("magnitude", "fishleg")
        for sparsity in (0.9, 0.5)
        for seed in (0, 1, 2)
    ]
    record.keep_accuracies("some", rows, "experiments.one", [], 100, tmp_path)
    folder = tmp_path / "docs" / "results"
    stored = json.loads((folder / "some.json").read_text())
    assert stored["columns"] == ["", "50 %", "90 %"] and stored["seed"] == "0, 1, 2"
    assert stored["rows"] == [
        ["dense", 90.0, 90.0],
        ["magnitude", [51.0, 50.0, 52.0], [51.0, 50.0, 52.0]],
        ["fishleg", [51.0, 50.0, 52.0], [51.0, 50.0, 52.0]],
    ]
    assert stored["examples"].startswith("64 training examples")  # as many as a method saw
    again = json.loads((folder / "some_recalibrated.json").read_text())
    assert "64 training images" in again["title"]
    assert again["rows"][-1] == ["fishleg", 60.0, 60.0]


def test_tables_of_networks_are_stacked():
    parts = {"one": TABLE, "two": TABLE._replace(data="mnist", rows=[["dense", 3.0]])}
    whole = record.stacked(parts, "both")
    assert [row[0] for row in whole.rows] == [
        "one: dense",
        "one: pruned",
        "one: none",
        "two: dense",
    ]
    assert whole.title == "both" and whole.data == "digits; mnist" and whole.seed == "0, 1"


def test_the_text_has_the_cells_of_the_page():
    assert "2.00 (1.50–2.50)" in str(TABLE)


@pytest.mark.parametrize(
    ("values", "cell"), [([3.0, None, 1.0, 2.0], [2.0, 1.0, 3.0]), ([2.0, 2.0], 2.0), ([], None)]
)
def test_spread(values, cell):
    assert record.spread(values) == cell


def test_the_commit_says_whether_code_differs(tmp_path):
    """Pages and tables do not count: they are what is recorded."""

    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True)

    def found():
        record.commit.cache_clear()
        return record.commit(tmp_path)

    assert found() == "unknown"
    code, table = tmp_path / "code.py", tmp_path / "docs" / "results" / "some.json"
    table.parent.mkdir(parents=True)
    code.write_text("1")
    table.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = found()
    assert len(clean) >= 7 and not clean.endswith("+")
    table.write_text("2")
    assert found() == clean
    code.write_text("2")
    assert found() == f"{clean}+"
    record.commit.cache_clear()
