"""Memorisation and influence of training examples, from models trained on random subsets."""

from typing import Any, NamedTuple

import numpy as np


class Memorisation(NamedTuple):
    """Estimates with their standard errors, as `memorisation` and `influence` return them.

    Attributes:
        score: Estimates in [-1, 1]; NaN where no model was trained with an example, or none
            without it.
        error: Standard errors, of the same shape; infinite where fewer than two models were trained
            with an example, or without it.
    """

    score: np.ndarray
    error: np.ndarray


def memorisation(correct: Any, members: Any) -> Memorisation:
    """How much more often an example is right where it was trained on: its memorisation.

    `mem(i) = P[h(xᵢ) = yᵢ | i ∈ S] − P[h(xᵢ) = yᵢ | i ∉ S]` over models h trained on random subsets
    S, both probabilities as means over the models given.

    Args:
        correct: Whether each model predicts each training example right, shape (models, examples);
            booleans, or probabilities in [0, 1].
        members: Whether each model was trained on each example, shape (models, examples), bool.

    Returns:
        A `Memorisation` with arrays of shape (examples,).  Its standard error is that of a
        difference of two means over independent models.

    Raises:
        ValueError: Arrays of other shapes or values.

    References:
        Feldman & Zhang, What neural networks memorize and why, NeurIPS 2020, eq. 1 and section 2.

    Example:
        >>> import fishleg_jax as flj
        >>> correct = [[1, 1], [1, 1], [1, 0], [1, 0]]
        >>> members = [[True, True], [False, True], [True, False], [False, False]]
        >>> flj.memorisation(correct, members).score.tolist()
        [0.0, 1.0]
    """
    correct, members = _checked(correct, members)
    if correct.shape != members.shape:
        raise ValueError(
            "correct must have the shape of members (models, examples), got "
            f"{correct.shape} and {members.shape}"
        )
    sums = [(correct * w).sum(axis=0) for w in (members, 1 - members)]
    squares = [(correct**2 * w).sum(axis=0) for w in (members, 1 - members)]
    counts = [w.sum(axis=0) for w in (members, 1 - members)]
    return _difference(sums, squares, counts)


def influence(correct: Any, members: Any) -> Memorisation:
    """How much more often other examples are right where an example was trained on: its influence.

    `infl(i, j) = P[h(xⱼ) = yⱼ | i ∈ S] − P[h(xⱼ) = yⱼ | i ∉ S]` over models h trained on random
    subsets S; for j = i it is the memorisation.

    Args:
        correct: Whether each model predicts each test example right, shape (models, tests);
            booleans, or probabilities in [0, 1].
        members: Whether each model was trained on each training example, shape (models, examples),
            bool.

    Returns:
        A `Memorisation` with arrays of shape (examples, tests).

    Raises:
        ValueError: Arrays of other shapes or values.

    References:
        Feldman & Zhang, What neural networks memorize and why, NeurIPS 2020, section 2.

    Example:
        >>> import fishleg_jax as flj
        >>> members = [[True], [True], [False], [False]]
        >>> flj.influence([[1, 1], [1, 0], [0, 1], [0, 0]], members).score.tolist()
        [[1.0, 0.0]]
    """
    correct, members = _checked(correct, members)
    sums = [w.T @ correct for w in (members, 1 - members)]
    squares = [w.T @ correct**2 for w in (members, 1 - members)]
    counts = [w.sum(axis=0)[:, None] for w in (members, 1 - members)]
    return _difference(sums, squares, counts)


def _checked(correct: Any, members: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as floats, or a ValueError."""
    correct, members = np.asarray(correct), np.asarray(members)
    if members.ndim != 2 or members.dtype != bool:
        raise ValueError(
            "members must be booleans of shape (models, examples), got shape "
            f"{members.shape} and dtype {members.dtype}"
        )
    if correct.ndim != 2 or len(correct) != len(members):
        raise ValueError(
            f"correct must have a row for each of the {len(members)} models, got shape "
            f"{correct.shape}"
        )
    correct = correct.astype(float)
    if not ((correct >= 0) & (correct <= 1)).all():
        raise ValueError("correct must be booleans or probabilities in [0, 1]")
    return correct, members.astype(float)


def _difference(sums: list, squares: list, counts: list) -> Memorisation:
    """Difference of two means with its standard error, from sums over models."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = [s / n for s, n in zip(sums, counts, strict=True)]
        variance = sum(
            np.maximum(q / n - m**2, 0) / (n - 1)
            for q, m, n in zip(squares, means, counts, strict=True)
        )
        known = (np.minimum(*counts) >= 2) & np.ones(np.shape(sums[0]), bool)
        error = np.where(known, np.sqrt(np.maximum(variance, 0)), np.inf)
    return Memorisation(means[0] - means[1], error)
