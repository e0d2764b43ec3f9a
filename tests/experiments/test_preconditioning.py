"""Preconditioners of the group update: the solve against dense algebra, and the command."""

import json

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.preconditioning import __main__ as preconditioning
from experiments.preconditioning import case as preconditioning_case
from experiments.preconditioning import table as preconditioning_table
from experiments.preconditioning.solving import make_system, solve
from tests import dense

MODEL = dense.categorical_mlp()
DAMPING = 0.01
NETWORK = ["--model", "mlp", "--epochs", "1", "--examples", "60", "--iterations", "5"]


@pytest.fixture
def problem(key):
    """A small system, its dense matrix on the kept weights, and its right side."""
    params = dense.mlp_params(key, (4, 5, 3))
    batch = dense.classification_batch(jax.random.key(1), 30, 4)
    masks = flj.make_masks(jax.tree.map(abs, params), 0.5)
    curvature = flj.curvature(MODEL, [batch])
    fisher = dense.exact_fisher(MODEL, params, batch).astype(np.float64)
    kept, weights = dense.ravel(masks).astype(bool), dense.ravel(params).astype(np.float64)
    matrix = (fisher + DAMPING * np.eye(len(fisher)))[np.ix_(kept, kept)]
    right = fisher[np.ix_(kept, ~kept)] @ weights[~kept]
    cost = weights[~kept] @ (fisher[np.ix_(~kept, ~kept)] @ weights[~kept]) / 2
    cost += DAMPING * weights[~kept] @ weights[~kept] / 2
    return make_system(curvature, params, masks, DAMPING), kept, matrix, right, cost


def test_without_a_preconditioner_the_solve_is_that_of_dense_algebra(problem):
    system, kept, matrix, right, cost = problem
    x, record = solve(system, flj.inverse.identity(), (), iterations=60, tolerance=1e-5)
    exact = np.linalg.solve(matrix, right)
    flat = dense.ravel(x)
    np.testing.assert_allclose(flat[kept], exact, rtol=1e-3, atol=1e-4)
    assert not flat[~kept].any()
    assert record.sound and record.true_residual < 1e-4
    assert record.residual[0] == 1 and record.residual[-1] <= 1e-5
    assert len(record.residual) == len(record.cost) == len(record.seconds) > 3
    np.testing.assert_allclose(record.cost[0], cost, rtol=1e-4)
    np.testing.assert_allclose(record.cost[-1], cost - right @ exact / 2, rtol=1e-4)
    assert np.all(np.diff(record.cost) < 1e-6 * cost) and np.all(np.diff(record.seconds) > 0)


def test_the_exact_inverse_needs_one_iteration(problem):
    system, kept, matrix, _, _ = problem
    inverse = np.zeros((len(kept), len(kept)), np.float32)
    inverse[np.ix_(kept, kept)] = np.linalg.inv(matrix)
    estimator = dense.estimator_of(jax.numpy.asarray(inverse))
    _, record = solve(system, estimator, (), iterations=10, tolerance=1e-4)
    assert len(record.residual) == 2 and record.sound
    # that of all weights, cut to the kept ones, is another matrix
    noise = np.diag(np.linspace(1, 3, len(kept))).astype(np.float32)
    estimator = dense.estimator_of(
        jax.numpy.asarray(noise @ inverse @ noise + 0.1 * np.eye(len(kept)))
    )
    _, worse = solve(system, estimator, (), iterations=10, tolerance=1e-4)
    assert len(worse.residual) > 2


def test_a_preconditioner_that_is_not_positive_is_told_of(problem):
    system, kept, *_ = problem
    estimator = dense.estimator_of(-jax.numpy.eye(len(kept)))
    x, record = solve(system, estimator, (), iterations=10, tolerance=1e-4)
    assert not record.sound and len(record.residual) == 1 and not dense.ravel(x).any()


@pytest.mark.slow
def test_a_small_run_writes_its_results_and_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = [*NETWORK, "--method", "none,diagonal", "--out", str(out)]
    assert preconditioning.main([*first, "--sparsity", "0.5"]) == 0
    before = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in before] == ["none", "diagonal"]
    more = [*first, "--sparsity", "0.5,0.9", "--fit", "current,dense"]
    assert preconditioning.main(more) == 0
    rows = json.loads((out / "results.json").read_text())
    assert rows[:2] == before
    assert [(row["method"], row["fit"], row["sparsity_target"]) for row in rows[2:]] == [
        ("none", None, 0.9),
        ("diagonal", "current", 0.9),
        ("diagonal", "dense", 0.5),
        ("diagonal", "dense", 0.9),
    ]
    for row in rows:
        assert row["sparsity"] == pytest.approx(row["sparsity_target"], abs=1e-4)
        assert row["iterations"] == 5 and row["sound"]
        assert {len(column) for column in row["history"].values()} == {6}
        assert row["cost"] < row["uncompensated_cost"]
        assert row["true_residual"] == pytest.approx(row["residual"], rel=0.05)
        assert (row["fit_seconds"] == 0) == (row["method"] == "none")
    # one mask, whatever the preconditioner
    for target in (0.5, 0.9):
        costs = {r["uncompensated_cost"] for r in rows if r["sparsity_target"] == target}
        assert len(costs) == 1
    assert (out / "preconditioning.png").stat().st_size > 1000
    capsys.readouterr()

    monkeypatch.setattr(
        preconditioning_case, "fit", lambda *a, **k: pytest.fail("a fit, of what was there already")
    )
    assert preconditioning.main(more) == 0
    printed = capsys.readouterr()
    assert json.loads((out / "results.json").read_text()) == rows and printed.err == ""
    assert "mlp, 90 % pruned, γ = 0.01" in printed.out and "to 0.001, s" in printed.out


def test_what_is_reached_is_the_first_iteration_at_a_residual():
    row = {"history": {"residual": [1.0, 0.3, 0.05, None], "seconds": [0.0, 1.0, 2.0, 3.0]}}
    assert preconditioning_table.reached(row, 0.3) == (1, 1.0)
    assert preconditioning_table.reached(row, 0.01) == (np.inf, np.inf)


def test_most_of_the_gain_is_that_of_the_lowest_cost():
    row = {"uncompensated_cost": 2.0, "history": {"cost": [2.0, 1.5, 1.004, 1.0]}}
    assert preconditioning_table.gained(row, 1.0) == 2
    assert preconditioning_table.gained(row, 0.5) == np.inf


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "mlp,vgg"], "'vgg' is not one of cnn, mlp"),
        (["--method", "magnitude"], "'magnitude' is not one of none, diagonal"),
        (["--fit", "new"], "'new' is not one of current, dense"),
        (["--damping", "1e-2,0"], "'0' is not a positive number"),
        (["--examples", "1298"], "--examples 1298: cnn has 1297 to train on"),
        (["--iterations", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(preconditioning.main, [*arguments, "--out", "out"], message)
