"""The textbook recursions against dense algebra, the cases against each other, the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import per_example, woodbury, woodbury_prepared

WEIGHTS, GRADIENTS, DAMPING = 30, 21, 1e-2
PROBLEM = {"weights": 500, "gradients": 120, "damping": 1e-3, "block_size": 128}


def rows():
    return jax.random.normal(jax.random.key(0), (GRADIENTS, WEIGHTS))


def inverse(g):
    return np.linalg.inv(DAMPING * np.eye(g.shape[1]) + g.T @ g / GRADIENTS)


def test_the_recursion_of_one_block_is_the_dense_inverse(x64):
    g = rows()
    state = woodbury.start(WEIGHTS, GRADIENTS, DAMPING)
    for part in (g[:9], g[9:]):
        state = woodbury.recursion(state, part, gradients=GRADIENTS, damping=DAMPING)
    expected = inverse(np.asarray(g))
    np.testing.assert_allclose(state.diagonal, np.diag(expected), rtol=1e-9)
    found = np.eye(WEIGHTS) / DAMPING - state.vectors.T @ state.vectors
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert int(state.count) == GRADIENTS


def test_the_recursion_in_blocks_is_the_dense_inverse_of_each(x64):
    g = rows()
    blocks = woodbury.start_blocks(WEIGHTS, 8, DAMPING)
    assert blocks.shape == (4, 8, 8)  # the last one has two weights that are none
    for part in (g[:9], g[9:]):
        blocks = woodbury.block_recursion(blocks, part, gradients=GRADIENTS)
    padded = np.pad(np.asarray(g), [(0, 0), (0, 2)])
    for i, block in enumerate(blocks):
        expected = inverse(padded[:, 8 * i : 8 * i + 8])
        np.testing.assert_allclose(block, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_all_cases_find_the_same_diagonal():
    batches = woodbury.Batches(PROBLEM["weights"], PROBLEM["gradients"])
    assert [len(batch[0]) for batch in batches] == [100, 20]
    found = {case: woodbury.make_build(case, **PROBLEM)(batches) for case in woodbury.CASES}
    for case, reference in woodbury.CASES.items():
        np.testing.assert_allclose(found[case], found[reference], rtol=1e-3)
    gradients = np.concatenate([np.asarray(inputs, np.float64) for inputs, _ in batches])
    matrix = gradients.T @ gradients / len(gradients) + 1e-3 * np.eye(PROBLEM["weights"])
    np.testing.assert_allclose(found["mfac"], np.diag(np.linalg.inv(matrix)), rtol=1e-3)
    assert batches.seconds > 0 and jnp.all(batches[0][1] == -1)


@pytest.mark.slow
def test_a_small_run_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(woodbury, "CASES", {"mfac": "mfac"})
    assert woodbury.main(["--weights", "500", "--gradients", "40"]) == 0
    header, rule, row = capsys.readouterr().out.splitlines()
    assert "times as fast" in header and "over gradients" in header
    name, seconds, ratio, *memory, difference = row.split()
    assert (name, float(ratio), float(difference)) == ("mfac", 1, 0)
    assert all(float(value) >= 0 for value in (seconds, *memory))  # rounded to tenths


@pytest.mark.slow
def test_prepared_states_are_timed_beside_the_published_algorithm(capsys):
    arguments = ["--weights", "500", "--gradients", "8,16", "--repeats", "1"]
    assert woodbury_prepared.main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["8"] * 4 + ["16"] * 4
    for row in rows[3::4]:  # nothing to prepare, so no sum and no ratio
        assert row[1:3] == ["published", "–"] and row[-2:] == ["–", "–"]
    assert all(float(row[-1]) == 1 for row in rows[::4])


@pytest.mark.slow
def test_grouped_convolutions_are_timed(capsys):
    arguments = ["--networks", "depthwise", "--estimates", "gradient", "--examples", "8"]
    assert per_example.main([*arguments, "--size", "4", "--repeats", "1"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert row[:3] == ["depthwise", "1760", "gradient"] and float(row[5]) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "0"], "'0' is not a whole number of at least 1"),
        (["--gradients", "1.5"], "'1.5' is not a whole number of at least 1"),
        (["--damping", "0"], "'0' is not a positive number"),
        (["--repeats", "no"], "'no' is not a whole number of at least 1"),
    ],
)
def test_bad_arguments_get_one_line(refuses, arguments, message):
    refuses(woodbury.main, arguments, message)
