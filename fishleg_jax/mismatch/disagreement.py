"""The predictions in which a dense and a pruned network differ."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fishleg_jax._batch import BatchLike, split_batch
from fishleg_jax._checks import arrays, numbers
from fishleg_jax._labels import check_outside
from fishleg_jax.mismatch.calibration import calibration_error
from fishleg_jax.mismatch.predictions import (
    Predictions,
    check_network,
    padding_of,
    predictions_of,
)
from fishleg_jax.mismatch.report import Disagreement, group_by, quantile_index
from fishleg_jax.model import Model

Network = Callable[..., Any] | tuple[Model | Callable[..., Any], Any]


def disagreement(
    dense: Network,
    pruned: Network,
    batches: Sequence[BatchLike],
    *,
    memorisation: Any | None = None,
    groups: int = 5,
    bins: int = 15,
) -> Disagreement:
    """Compares two classifiers prediction by prediction.

    Networks of equal accuracy may still differ in many predictions, and not in random ones: rare
    and memorised examples are lost first (Dam et al.).

    Args:
        dense: Network before pruning: a function `(inputs) -> logits` or `(inputs, constants) ->
            logits`, or a pair `(model, params)` of a `Model` or predict function and its
            parameters.  A function, alone or in a pair, gets the constants of a batch if its next
            parameter has no default, or if one is named `constants` that has none or None; a
            default such as `train=False` is kept.  A `Model` always gets them.  A function of the
            inputs alone may close over constants of its own.
        pruned: Network after pruning, likewise.
        batches: Data to compare on; without labels, `(inputs, None)`, flips, accuracies and
            calibration are left out.  Predictions whose label is the padding of either `Model`,
            as in `likelihoods.categorical(ignore=-100)`, are not counted anywhere; without labels
            all are.
        memorisation: Optional score of every example, shape (examples,), such as that of
            `flj.memorisation`, or the largest influence of a training example; one per label where
            an example has several, padding included.  NaN for unknown ones, which are left out of
            the groups by memorisation and of the excess; those of padding are not read.
        groups: Number of groups by margin and by memorisation, 5 by default.
        bins: Number of bins of the calibration error, 15 by default.

    Returns:
        A `Disagreement`.

    Raises:
        ValueError: Something other than a network, a function with other arguments, a batch or
            labels of the right shape and range, padding alone, scores of another shape, infinite or
            all unknown, or a number below 1.
        FloatingPointError: Outputs that are not finite, but for those of padding.

    References:
        Dam et al., Understanding the effect of the long tail on neural network compression, 2023;
        Guo et al., On calibration of modern neural networks, ICML 2017, eq. 3.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.categorical())
        >>> weights = jnp.array([[2.0, 0.0], [0.3, 0.5]])
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.1, 2.0]]), jnp.array([0, 1, 1])
        >>> pruned = flj.apply_masks(weights, jnp.array([[True, False], [True, False]]))
        >>> flj.disagreement((model, weights), (model, pruned), [batch])
        Disagreement(2 of 3 differ (66.67 %): 2 lost, 0 gained; accuracy 100.00 to 33.33 %)
    """
    groups, bins = numbers.check_count(groups, "groups"), numbers.check_count(bins, "bins")
    arrays.check_batches(batches)
    for network, name in ((dense, "dense"), (pruned, "pruned")):
        check_network(network, batches, name)
    one, other = (predictions_of(network, batches) for network in (dense, pruned))
    if one.number != other.number or len(one.classes) != len(other.classes):
        raise ValueError(
            "dense and pruned must predict the same classes for the same examples, got "
            f"{len(one.classes)} predictions of {one.number} classes and {len(other.classes)} of "
            f"{other.number}"
        )
    padding = {padding_of(network) for network in (dense, pruned)} - {None}
    labels = _checked_labels(batches, one, padding)
    # Padding is left out of everything that follows.
    places = len(one.classes)
    positions = np.arange(places)
    if labels is not None:
        positions = np.flatnonzero(~np.isin(labels, list(padding)))
        labels = labels[positions]
    one, other = one.at(positions, "dense"), other.at(positions, "pruned")
    scores = None if memorisation is None else _scores(memorisation, places, positions)

    # Flips: which of the predictions that differ only one of the networks has right.
    differ = one.classes != other.classes
    lost = gained = accuracies = calibration = None
    if labels is not None:
        right = one.classes == labels, other.classes == labels
        lost, gained = differ & right[0], differ & right[1]
        accuracies = tuple(float(x.mean()) for x in right)
        calibration = tuple(
            calibration_error(x.confidences, r, bins)
            for x, r in zip((one, other), right, strict=True)
        )
    flips = differ, lost, gained

    # Counts by class, by margin and, where it is known, by memorisation.
    known = one.classes if labels is None else labels
    memorised = excess = None
    if scores is not None:
        scored = ~np.isnan(scores)
        scores = scores[scored]
        own = [None if x is None else x[scored] for x in flips]
        memorised = group_by(quantile_index(scores, groups), scores, *own)
        excess = _excess(scores, own[0])
    return Disagreement(
        len(differ),
        int(differ.sum()),
        None if lost is None else int(lost.sum()),
        None if gained is None else int(gained.sum()),
        accuracies,
        calibration,
        group_by(known, known, *flips),
        group_by(quantile_index(one.margins, groups), one.margins, *flips),
        memorised,
        excess,
        (one.classes, other.classes),
        labels,
        one.margins,
        positions,
    )


def _checked_labels(
    batches: Sequence[BatchLike], found: Predictions, padding: set[int]
) -> np.ndarray | None:
    """Labels of all predictions, one after the other, with padding; None without labels."""
    targets = [split_batch(batch)[1] for batch in batches]
    if targets[0] is None:
        return None
    labels = np.concatenate([np.asarray(x).ravel() for x in targets])
    if labels.dtype.kind not in "iub" or labels.shape != found.classes.shape:
        raise ValueError(
            f"batches must have {len(found.classes)} labels of an integer type, one per "
            f"prediction, or None, got {len(labels)} of dtype {labels.dtype}"
        )
    for label in padding:
        check_outside(label, found.number)
    counted = ~np.isin(labels, list(padding))
    wrong = labels[counted & ((labels < 0) | (labels >= found.number))]
    names = " or ".join(map(str, sorted(padding)))
    if len(wrong):
        hint = f", or {names} for padding"
        if not padding:
            hint = " (to leave padding out, give a Model with likelihoods.categorical(ignore=-100))"
        raise ValueError(
            f"batches must have labels from 0 to {found.number - 1}, for the {found.number} "
            f"classes of the outputs{hint}, got {wrong[0]}"
        )
    if not counted.any():
        raise ValueError(f"batches must have a label other than padding, got {names} alone")
    return labels


def _scores(memorisation: Any, places: int, positions: np.ndarray) -> np.ndarray:
    """Scores of the predictions at some positions; NaN for unknown ones."""
    scores = np.asarray(memorisation, float)
    if scores.shape != (places,):
        raise ValueError(
            f"memorisation must have one score for each of the {places} predictions, got shape "
            f"{scores.shape}"
        )
    scores = scores[positions]
    unknown, infinite = np.isnan(scores), np.isinf(scores)
    if unknown.all() or infinite.any():
        raise ValueError(
            "memorisation must be finite, or NaN for some scores that are unknown, got "
            f"{int(unknown.sum())} NaN and {int(infinite.sum())} infinite of {len(scores)}"
        )
    return scores


def _excess(scores: np.ndarray, differ: np.ndarray) -> tuple[float, float] | None:
    """Mean score of the predictions that differ over that of the others, with its error."""
    parts = scores[differ], scores[~differ]
    if min(map(len, parts)) < 2:
        return None
    variance = sum(x.var(ddof=1) / len(x) for x in parts)
    return float(parts[0].mean() - parts[1].mean()), float(variance**0.5)
