"""The report: counts and shares, and the table."""

import jax.numpy as jnp
import pytest

from fishleg_jax.pruning.report import make_report, removed_scores, stage_table

SCORES = {
    "a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.ones(3), "c": jnp.array([[5.0, 10.0]])
}  # fmt: skip
OLD = {"a": jnp.array([[False, True], [True, True]]), "b": jnp.ones(3, bool),
       "c": jnp.ones((1, 2), bool)}  # fmt: skip
NEW = {"a": jnp.array([[False, False], [True, True]]), "b": jnp.zeros(3, bool),
       "c": jnp.array([[False, True]])}  # fmt: skip
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
