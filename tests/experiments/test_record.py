"""Tables are kept with their command, commit and date, and a page can be made from them."""

import json

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
    assert kept["rows"][1] == ["pruned", [2.0, 1.5, 2.5]]  # rounded as it is shown
    page = pages.render("some", tmp_path)
    assert "| pruned | 2.00 (1.50–2.50) |" in page and "| none | |" in page


def test_nothing_is_kept_without_a_name(tmp_path):
    record.keep(None, TABLE, "experiments.one", [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_text_has_the_cells_of_the_page():
    assert "2.00 (1.50–2.50)" in str(TABLE)


@pytest.mark.parametrize(
    ("values", "cell"), [([3.0, None, 1.0, 2.0], [2.0, 1.0, 3.0]), ([2.0, 2.0], 2.0), ([], None)]
)
def test_spread(values, cell):
    assert record.spread(values) == cell


def test_the_commit_says_whether_files_differ():
    assert record.commit() == "unknown" or len(record.commit().rstrip("+")) >= 7
