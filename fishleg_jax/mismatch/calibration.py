"""Calibration of predicted probabilities."""

import numpy as np


def calibration_error(confidences: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over equal bins.

    Args:
        confidences: Probabilities of the predicted classes, shape (examples,), in [0, 1].
        correct: Whether each prediction is right, shape (examples,), bool.
        bins: Number of bins of equal width in [0, 1].

    Returns:
        The error, in [0, 1].

    References:
        Guo et al., On calibration of modern neural networks, ICML 2017, eq. 3.

    Example:
        >>> import numpy as np
        >>> calibration_error(np.array([0.75, 0.75]), np.array([True, False]), 10)
        0.25
    """
    index = np.minimum((np.asarray(confidences, float) * bins).astype(int), bins - 1)
    # |B| · |accuracy − confidence| of a bin is the distance of two sums
    right = np.bincount(index, weights=correct, minlength=bins)
    sure = np.bincount(index, weights=confidences, minlength=bins)
    return float(np.abs(right - sure).sum() / len(index))
