"""Scores that depend on the frequency of a coefficient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._checks import numbers
from fishleg_jax.bases.basis import Basis, check_basis
from fishleg_jax.pruning.scores import NAMES, Saliency, scores_by


def by_band(
    basis: Basis, rate: Callable[[jax.Array], jax.Array], saliency: Saliency = "obs"
) -> Callable[..., Any]:
    """Scores with a rate of compression for every frequency band.

    All coefficients share one threshold on `score / rate(x)`, so that bands with a rate above 1
    lose more of theirs.  The relative frequency x is the coefficient's band divided by the highest
    one of its leaf: 0 for the mean of a kernel, 1 for its highest frequency.  Leaves that keep
    their basis have a rate of 1.

    Args:
        basis: Basis that the pruned model is in.
        rate: Function of an array of relative frequencies in [0, 1] to positive numbers of the same
            shape; `lambda x: 1 + x` prunes the highest frequencies at twice the threshold.
        saliency: Scores to divide: `obs` (the default), `obd`, `mixture`, `magnitude`, or a
            function `(params, masks, estimator, state, gradient) -> scores`.

    Returns:
        A function for the argument `saliency` of `prune_one_shot`, `gradual_prune` and
        `fishleg_prune`.  With `regrow` coefficients come back by their shadows if `saliency` is
        `magnitude`, else as with any function.

    Raises:
        ValueError: Another type of argument; rates that are not positive, when it is called.

    References:
        Liu, Xu, Peng & Xiong, Frequency-domain dynamic pruning for convolutional neural networks,
        NeurIPS 2018, where the threshold of each band of DCT coefficients is its own.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> basis = flj.bases.dct()
        >>> saliency = flj.bases.by_band(basis, lambda x: 1 + x, "magnitude")
        >>> scores = saliency({"conv": jnp.ones((3, 3, 1, 1))}, None, None, None, None)
        >>> [round(float(x), 2) for x in scores["conv"][0, :, 0, 0]]
        [0.5, 0.4, 0.33]
    """
    check_basis(basis)
    numbers.check_function(rate, "rate", 1, "a function of relative frequencies")
    if not callable(saliency) and saliency not in NAMES:
        raise ValueError(
            f"saliency must be one of {', '.join(NAMES)} or a function, got {_text.shown(saliency)}"
        )

    def scores(params, masks, estimator, state, gradient):
        raw = scores_by(saliency, estimator, state, params, masks, gradient)
        return jax.tree.map(divided, raw, basis.bands(params))

    def divided(score, bands):
        with jax.ensure_compile_time_eval():
            highest = int(bands.max()) if bands.size else 0
            if highest == 0:
                return score
            rates = jnp.asarray(rate(bands / highest))
            if rates.shape != bands.shape or not bool(jnp.all((rates > 0) & (rates < jnp.inf))):
                raise ValueError(
                    "rate must return a positive number for every relative frequency, got shape "
                    f"{rates.shape} and a lowest value of {float(rates.min()):g}"
                )
        return score / rates.astype(score.dtype)

    # says which of the pruned weights gradual pruning lets come back
    scores.by_magnitude = saliency == "magnitude" or getattr(saliency, "by_magnitude", False)
    return scores
