"""Which training image counts most for a test image, and by how much: of images that are lost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import fishleg_jax as flj
from experiments.disagreement.ensemble import Ensemble

AT_ONCE = 2**20  # pairs of a training and a test image, about 120 MB


class Strongest(NamedTuple):
    """The most influential training image of every test image, among those of its class.

    The highest of many noisy scores is high by chance.  So `held_out` is found by one half of the
    ensemble and measured by the other, in both directions: its expectation is that image's true
    influence, zero if nothing but noise chose it.

    Attributes:
        image: its position among the training images, -1 if unknown.
        score: its influence, over all networks, NaN if unknown.
        held_out: influence of the image that one half of the networks finds, in the other half.
    """

    image: np.ndarray
    score: np.ndarray
    held_out: np.ndarray


def strongest(
    ensemble: Ensemble, labels: np.ndarray, test_labels: np.ndarray, at_once: int = AT_ONCE
) -> Strongest:
    """Finds the most influential training image of every test image.

    Args:
        ensemble: networks on subsets whose correctness on test images is known.
        labels: classes of the training images.
        test_labels: classes of the test images.
        at_once: pairs of images in memory at a time.
    """
    tests = len(test_labels)
    found = Strongest(np.full(tests, -1), np.full(tests, np.nan), np.full(tests, np.nan))
    for label in np.unique(test_labels):
        train, test = np.flatnonzero(labels == label), np.flatnonzero(test_labels == label)
        if not len(train):
            continue
        width = max(at_once // len(train), 1)
        for own in np.split(test, range(width, len(test), width)):
            correct, members = ensemble.test[:, own], ensemble.members[:, train]
            score = flj.influence(correct, members).score
            image, found.score[own] = _highest(score)
            found.image[own] = np.where(np.isnan(found.score[own]), -1, train[image])
            halves = [flj.influence(correct[k::2], members[k::2]).score for k in (0, 1)]
            columns = np.arange(len(own))
            both = [
                np.where(np.isnan(best), np.nan, other[place, columns])
                for one, other in (halves, halves[::-1])
                for place, best in [_highest(one)]
            ]
            known = np.count_nonzero(~np.isnan(both), axis=0)
            total = np.nansum(both, axis=0)
            found.held_out[own] = np.where(known > 0, total / np.maximum(known, 1), np.nan)
    return found


def _highest(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and value of each column's highest score; NaN for a column without any."""
    filled = np.where(np.isnan(score), -np.inf, score)
    highest = filled.max(axis=0)
    return filled.argmax(axis=0), np.where(np.isinf(highest), np.nan, highest)


def excess(
    found: Strongest, lost: Sequence[int], right: np.ndarray
) -> tuple[float | None, float | None]:
    """How much stronger the influence on lost images is, than on those that stay right.

    Args:
        found: the strongest influences.
        lost: positions of test images that only the dense network has right.
        right: whether the dense network has each test image right.

    Returns:
        The mean of `held_out` over lost images minus that over other images that the dense network
        has right, and its standard error over images; None with fewer than two of either.
    """
    mask = np.isin(np.arange(len(right)), lost)
    known = ~np.isnan(found.held_out)
    parts = found.held_out[mask & known], found.held_out[right & ~mask & known]
    if min(map(len, parts)) < 2:
        return None, None
    variance = sum(x.var(ddof=1) / len(x) for x in parts)
    return float(parts[0].mean() - parts[1].mean()), float(variance**0.5)


def with_influence(
    rows: Sequence[Mapping[str, Any]], found: Strongest | None, right: np.ndarray | None
) -> list[dict[str, Any]]:
    """Adds the excess to objects of `results.json`, `influence_excess` and `influence_error`.

    Args:
        rows: the objects.
        found: the strongest influences; None if the ensemble does not know test images.
        right: whether the dense network has each test image right; None likewise.
    """
    made = []
    for row in rows:
        mean, error = (None, None)
        if found is not None and right is not None:
            mean, error = excess(found, row["where_lost"], right)
        made.append({**row, "influence_excess": mean, "influence_error": error})
    return made


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each object that has an excess.

    Args:
        rows: objects with `influence_excess`.
    """
    return "\n".join(
        f"seed {row['seed']}  {row['method']:20} influence on lost images "
        f"{row['influence_excess']:+.3f} above the others' (standard error "
        f"{row['influence_error']:.3f})"
        for row in rows
        if row["influence_excess"] is not None
    )
