"""The paired interval against numpy, and against the unpaired one."""

import numpy as np
import pytest

from experiments.report import paired


def test_the_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    theirs = rng.random(650) < 0.4
    ours = theirs | (rng.random(650) < 0.05)
    mean, low, high = paired.difference(ours, theirs)
    d = 100 * (ours.astype(float) - theirs)
    error = 1.96 * d.std(ddof=1) / np.sqrt(650)
    np.testing.assert_allclose([mean, low, high], [d.mean(), d.mean() - error, d.mean() + error])
    # photos that both know, or neither, make it no wider: unpaired it would include zero
    both = np.sqrt(ours.var() + theirs.var()) * 196 / np.sqrt(650)
    assert low > 0 and mean - both < 0


def test_it_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        theirs = rng.random(300) < 0.5
        ours = np.where(rng.random(300) < 0.3, rng.random(300) < 0.7, theirs)
        _, low, high = paired.difference(ours, theirs)
        held += low <= 100 * 0.3 * 0.2 <= high
    assert 0.92 < held / 400 < 0.98


@pytest.mark.parametrize(("ours", "theirs"), [([True], [True]), ([True, False], [True])])
def test_too_few_pairs_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="two or more pairs are needed"):
        paired.difference(ours, theirs)
