"""Memorisation and influence: against means by hand, and against what a process was made with."""

import numpy as np
import pytest

import fishleg_jax as flj


def drawn(models=4000, examples=6, seed=0):
    """Correctness with known probabilities: inside and outside of the subsets."""
    rng = np.random.default_rng(seed)
    inside, outside = np.linspace(0.9, 1, examples), np.linspace(0.1, 0.9, examples)
    members = rng.random((models, examples)) < 0.7
    correct = rng.random((models, examples)) < np.where(members, inside, outside)
    return correct, members, inside - outside


def test_scores_are_differences_of_means():
    correct, members, _ = drawn(models=30)
    found = flj.memorisation(correct, members)
    for i in range(members.shape[1]):
        inside, outside = correct[members[:, i], i], correct[~members[:, i], i]
        np.testing.assert_allclose(found.score[i], inside.mean() - outside.mean())
        variance = inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside)
        np.testing.assert_allclose(found.error[i], variance**0.5)


def test_estimates_lie_within_their_errors():
    correct, members, truth = drawn()
    found = flj.memorisation(correct, members)
    assert (np.abs(found.score - truth) < 4 * found.error).all()
    assert (found.error < 0.03).all() and (found.error > 0.001).all()


def test_the_diagonal_of_the_influence_is_the_memorisation():
    correct, members, _ = drawn(models=50)
    whole, own = flj.influence(correct, members), flj.memorisation(correct, members)
    np.testing.assert_allclose(np.diag(whole.score), own.score)
    np.testing.assert_allclose(np.diag(whole.error), own.error)
    i, j = 1, 4
    inside = members[:, i]
    expected = correct[inside, j].mean() - correct[~inside, j].mean()
    np.testing.assert_allclose(whole.score[i, j], expected)


def test_an_example_without_models_of_one_kind_is_unknown():
    members = np.array([[True, True], [True, False], [True, False], [True, True]])
    found = flj.memorisation(members, members)
    assert np.isnan(found.score[0]) and found.score[1] == 1
    assert np.isinf(found.error[0]) and found.error[1] == 0
    once = flj.memorisation(members[:3], members[:3])
    assert once.score[1] == 1 and np.isinf(once.error[1])


@pytest.mark.parametrize(
    "correct, members, message",
    [
        (np.ones((3, 2)), np.ones((3, 2)), "members must be booleans"),
        (np.ones((2, 2)), np.ones((3, 2), bool), "a row for each of the 3 models"),
        (np.full((3, 2), 1.5), np.ones((3, 2), bool), r"probabilities in \[0, 1\]"),
        (np.ones((3, 1)), np.ones((3, 2), bool), "shape of members"),
    ],
)
def test_bad_arguments_are_refused(correct, members, message):
    with pytest.raises(ValueError, match=message):
        flj.memorisation(correct, members)
