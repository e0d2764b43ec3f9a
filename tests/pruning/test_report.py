"""The report: counts and shares, and the table."""

import html.parser
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning.report import Report, Row, make_report, removed_scores, stage_table

SCORES = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.ones(3), "c": jnp.array([[5.0, 10.0]])}
OLD = {
    "a": jnp.array([[False, True], [True, True]]),
    "b": jnp.ones(3, bool),
    "c": jnp.ones((1, 2), bool),
}
NEW = {
    "a": jnp.array([[False, False], [True, True]]),
    "b": jnp.zeros(3, bool),
    "c": jnp.array([[False, True]]),
}
CHOSEN = [True, False, True]


def test_rows_and_total():
    """Only what is newly pruned in prunable leaves adds to the predicted increase."""
    a, c = make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN).rows
    assert a == ("a", (2, 2), 4, 2, 0.5, 2.0, pytest.approx(2 / 7))
    assert c == ("c", (1, 2), 2, 1, 0.5, 5.0, pytest.approx(5 / 7))
    total = make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN).total
    assert total == ("total", (), 6, 3, 0.5, 7.0, 1.0)


def test_nothing_pruned_divides_by_nothing():
    report = make_report(removed_scores(SCORES, OLD, OLD), OLD, CHOSEN)
    assert [r.share for r in (*report.rows, report.total)] == [0, 0, 0]


def test_table_has_a_line_a_leaf():
    lines = str(make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN)).splitlines()
    assert len({len(line.rstrip()) for line in lines}) == 1  # columns end together
    assert lines[2].split() == ["a", "2×2", "4", "2", "50.00%", "28.57%"]
    assert lines[-1].split() == ["total", "6", "3", "50.00%", "100.00%"]


def test_stages_have_a_table_with_what_they_tell():
    stages = (
        {"sparsity": 0.5, "predicted": 0.011, "step": 1.0, "losses": [1.0, 2.0]},
        {"sparsity": 0.75, "predicted": 12.3456, "actual": -0.5, "damping": None},
    )
    lines = stage_table(stages).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["stage", "sparsity", "predicted", "actual", "step"]
    assert lines[2].split() == ["1", "50.00%", "0.011", "1"]
    assert lines[3].split() == ["2", "75.00%", "12.3", "-0.5"]
    told = make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN, stages, "for a reason")
    first, second, third = str(told).split("\n\n")
    assert first == str(make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN))
    assert second == stage_table(stages) and third == "Stopped: for a reason"


@pytest.mark.parametrize("told, tables", [({}, 1), ({"actual": 0.1}, 2)])
def test_a_single_stage_has_a_table_where_it_has_something_to_tell(told, tables):
    stages = ({"sparsity": 0.5, "predicted": 7.0} | told,)
    report = make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN, stages)
    assert len(str(report).split("\n\n")) == tables


def some_report(**changes):
    stages = (
        {"sparsity": 0.5, "predicted": jnp.nan, "actual": np.float32(0.25)},
        {"sparsity": 0.5, "predicted": 1.0, "losses": jnp.arange(2.0)},
    )
    left_out = (("a/bias", (3,), "bias"), ("norm/scale", (), "normalisation"))
    left_out += tuple((f"{name}/bias", (2,), "bias") for name in "bcdef")
    arguments = {"stages": stages, "stopped": "NaN at <stage 2>", "left_out": left_out} | changes
    return make_report(removed_scores(SCORES, OLD, NEW), NEW, CHOSEN, **arguments)


def test_leaves_left_out_stand_first_by_reason():
    first, table, *_ = str(some_report()).split("\n\n")
    assert first.splitlines() == [
        "Left out (bias): 6 leaves, 13 weights: a/bias, b/bias, c/bias and 3 more",
        "Left out (normalisation): 1 leaf, 1 weight: norm/scale",
    ]
    assert table.startswith("leaf")
    assert str(some_report(left_out=())).startswith("leaf")


def test_repr_is_short_and_says_what_matters():
    report = some_report()
    first, second = repr(report).splitlines()
    assert first == (
        "Report(sparsity 50.00%, kept 3 of 6 weights in 2 leaves, 7 leaves left out, 2 stages)"
    )
    assert second == "Stopped: NaN at <stage 2>"
    result = flj.Result(NEW, NEW, report, None, report.stages, report.stopped)
    assert repr(result) == repr(report).replace("Report", "Result")
    assert len(repr(some_report(stopped=None)).splitlines()) == 1


class Cells(html.parser.HTMLParser):
    """The texts of cells and paragraphs, and whether all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("td", "th", "p"):
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[-1] += data


def test_notebooks_show_the_same_tables_with_names_escaped():
    row = Row("<b>&amp;", (2, 2), 4, 2, 0.5, 1.0, 1.0)
    report = some_report()._replace(rows=(row,))
    texts = Cells(report._repr_html_()).texts
    assert "<b>&amp;" in texts and "Stopped: NaN at <stage 2>" in texts
    words = [word for text in texts for word in text.split()]
    lines = [line for line in str(report).splitlines() if not line.startswith("---")]
    assert sorted(words) == sorted(word for line in lines for word in line.split())
    result = flj.Result(NEW, NEW, report, None, report.stages)
    assert result._repr_html_() == report._repr_html_()


def test_to_dict_is_ready_for_json():
    told = some_report().to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["rows"][0] == {
        "name": "a",
        "shape": [2, 2],
        "weights": 4,
        "kept": 2,
        "sparsity": 0.5,
        "predicted": 2.0,
        "share": pytest.approx(2 / 7),
    }
    assert told["stages"][0] == {"sparsity": 0.5, "predicted": None, "actual": 0.25}
    assert told["stages"][1]["losses"] == [0.0, 1.0]
    assert told["stopped"] == "NaN at <stage 2>" and told["total"]["kept"] == 3
    assert told["left_out"][0] == {"name": "a/bias", "shape": [3], "reason": "bias"}


def test_a_report_is_still_a_tuple():
    report = some_report(stages=(), left_out=())
    rows, total, stages, stopped, left_out, started, remainders = report
    assert report == Report(rows, total, stages, stopped, left_out, started, remainders)
    assert report._replace(stopped=None).stopped is None
    assert jax.tree.structure(report) == jax.tree.structure(Report(*report))
