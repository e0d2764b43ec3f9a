"""The predictions in which a dense and a pruned network differ."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fishleg_jax._batch import BatchLike, split_batch
from fishleg_jax._checks import arrays, numbers
from fishleg_jax.mismatch.calibration import calibration_error
from fishleg_jax.mismatch.predictions import Predictions, check_network, predictions_of
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
            calibration are left out.
        memorisation: Optional score of every example, shape (examples,), such as that of
            `flj.memorisation`, or the largest influence of a training example; one per prediction
            where an example has several.
        groups: Number of groups by margin and by memorisation, 5 by default.
        bins: Number of bins of the calibration error, 15 by default.

    Returns:
        A `Disagreement`.

    Raises:
        ValueError: Something other than a network, a function with other arguments, a batch or
            labels of the right shape and range, scores of another shape or not finite, or a number
            below 1.
        FloatingPointError: Outputs that are not finite.

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
    one, other = (
        predictions_of(network, batches, name)
        for network, name in ((dense, "dense"), (pruned, "pruned"))
    )
    if one.number != other.number or len(one.classes) != len(other.classes):
        raise ValueError(
            "dense and pruned must predict the same classes for the same examples, got "
            f"{len(one.classes)} predictions of {one.number} classes and {len(other.classes)} of "
            f"{other.number}"
        )
    labels = _labels(batches, one)
    scores = None if memorisation is None else _scores(memorisation, one)

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

    # Counts by class, by margin and by memorisation.
    known = one.classes if labels is None else labels
    return Disagreement(
        len(differ),
        int(differ.sum()),
        None if lost is None else int(lost.sum()),
        None if gained is None else int(gained.sum()),
        accuracies,
        calibration,
        group_by(known, known, *flips),
        group_by(quantile_index(one.margins, groups), one.margins, *flips),
        None if scores is None else group_by(quantile_index(scores, groups), scores, *flips),
        None if scores is None else _excess(scores, differ),
        (one.classes, other.classes),
        labels,
        one.margins,
    )


def _labels(batches: Sequence[BatchLike], found: Predictions) -> np.ndarray | None:
    """Labels of all predictions, one after the other; None without labels."""
    targets = [split_batch(batch)[1] for batch in batches]
    if targets[0] is None:
        return None
    labels = np.concatenate([np.asarray(x).ravel() for x in targets])
    if labels.dtype.kind not in "iub" or labels.shape != found.classes.shape:
        raise ValueError(
            f"batches must have {len(found.classes)} labels of an integer type, one per "
            f"prediction, or None, got {len(labels)} of dtype {labels.dtype}"
        )
    wrong = labels[(labels < 0) | (labels >= found.number)]
    if len(wrong):
        raise ValueError(
            f"batches must have labels from 0 to {found.number - 1}, for the {found.number} "
            f"classes of the outputs, got {wrong[0]}"
        )
    return labels


def _scores(memorisation: Any, found: Predictions) -> np.ndarray:
    scores = np.asarray(memorisation, float)
    if scores.shape != found.classes.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"memorisation must have one finite score for each of the {len(found.classes)} "
            f"predictions, got shape {scores.shape} with {int((~np.isfinite(scores)).sum())} that "
            "are not finite"
        )
    return scores


def _excess(scores: np.ndarray, differ: np.ndarray) -> tuple[float, float] | None:
    """Mean score of the predictions that differ over that of the others, with its error."""
    parts = scores[differ], scores[~differ]
    if min(map(len, parts)) < 2:
        return None
    variance = sum(x.var(ddof=1) / len(x) for x in parts)
    return float(parts[0].mean() - parts[1].mean()), float(variance**0.5)
