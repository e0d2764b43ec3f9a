"""Scores of whole units, from their own blocks of the inverse Fisher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks import arrays
from fishleg_jax.compaction.couplings import Coupling, Member, read_all
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.masks import patterns
from fishleg_jax.pruning.masks.group_scores import of_groups
from fishleg_jax.pruning.masks.groups import check_masks, make_groups
from fishleg_jax.pruning.masks.layout import CONSTANTS
from fishleg_jax.pruning.scores import NAMES, Saliency, check_saliency, scores_by


class UnitScores(NamedTuple):
    """Scores of units, for `choose_units`.

    Attributes:
        couplings: Axes that index the same units, each coupling a list of `(key path, axis)` or
            `(key path, axis, block size)`.
        values: Scores of the units of each coupling, arrays of shape (units,), at least 0.
    """

    couplings: list[list[tuple]]
    values: list[np.ndarray]

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


def unit_scores(
    estimator: InverseFisher,
    state: Any,
    params: Any,
    couplings: list[list[tuple]],
    *,
    saliency: Saliency = "obs",
    masks: Any | None = None,
) -> UnitScores:
    """Predicted rise of the loss when whole units go: channels, neurons, heads.

    A unit's weights B in one leaf have the score `½ w_Bᵀ [(F⁻¹)_BB]⁻¹ w_B`, with all other weights
    making up for them, or `½ w_Bᵀ F_BB w_B` with none that moves; leaves are added up, biases and
    norms included.  Where the estimate has no blocks of that shape, the scores of single weights
    are added up, as in `prune_one_shot` with `patterns.units`.

    Args:
        estimator: Estimate of the inverse Fisher.
        state: Its state, fitted at these weights, as `fit` returns it.
        params: Weights, any pytree.
        couplings: Axes that index the same units, as `find_couplings` returns them; constants among
            them have no score.
        saliency: `obs`, the default, `obd`, their geometric mean `mixture`, `magnitude`, or a
            function `(params, masks, estimator, state, gradient) -> scores` of single weights.
        masks: Pytree of booleans like the weights, False for what is pruned already; None for none.

    Returns:
        `UnitScores`, in nats per example, for `choose_units`.

    Raises:
        ValueError: Invalid weights or masks, couplings that do not fit them, or scores that the
            estimate can't give.

    References:
        Hassibi & Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, 1992,
        equation 5, for several weights at once.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"w1": jnp.ones((3, 2)), "w2": jnp.array([[1.0], [3.0]])}
        >>> flj.unit_scores(
        ...     flj.inverse.identity(), (), params, [[("w1", 1), ("w2", 0)]]).values
        [array([2., 6.])]
    """
    arrays.check_params(params)
    check_saliency(saliency, estimator)
    if saliency == "auto":
        raise ValueError(
            f"saliency must be one of {', '.join(NAMES)} or a function, got 'auto', which measures "
            "losses"
        )
    if masks is None:
        masks = jax.tree.map(lambda x: jnp.ones(jnp.shape(x), bool), params)
    check_masks(params, masks)
    leaves = dict(_tree.named_leaves(params))
    trained = couplings
    if isinstance(couplings, (list, tuple)):
        trained = [_without_constants(x) for x in couplings]
    given = read_all(trained, leaves)
    # Score single weights, then the units of one coupling at a time: leaves in which couplings meet
    # have other tiles for each.
    ready = prepared(estimator, state, params)
    singles = scores_by(saliency, estimator, ready, params, masks, None, state)
    values = []
    for members in given:
        pattern = patterns.units([[x.short for x in members]])
        names = {x.name for x in members}
        coupled = jax.tree.structure(params).unflatten(name in names for name in leaves)
        groups = make_groups(params, coupled, "global", None, pattern)
        states = ready, state
        shares = of_groups(groups, saliency, estimator, states, params, masks, None, singles)
        kept = dict(_tree.named_leaves(_tree.apply_mask(shares, masks)))
        values.append(of_members(members, kept))
    return UnitScores(couplings, values)


def _without_constants(coupling: Coupling) -> Coupling:
    """Members of a coupling that are parameters; anything but a list is left to `read`."""
    if not isinstance(coupling, (list, tuple)):
        return coupling
    constant = lambda x: not isinstance(x, str) and str(x[0]).startswith(CONSTANTS)
    return [x for x in coupling if not constant(x)]


def of_members(members: tuple[Member, ...], scores: dict[str, Any]) -> np.ndarray:
    """Sum of the scores of everything that belongs to each unit, float64.

    Raises:
        ValueError: A sum is not finite.
    """
    total = np.zeros(members[0].units)
    for x in members:
        if x.name in scores:
            parts = x.by_unit(np.asarray(scores[x.name], np.float64))
            total += parts.sum(axis=(0, 2, 3))
    if not np.isfinite(total).all():
        raise ValueError(f"scores: {members[0].name!r} has units with NaN or infinite scores")
    return total


def of_given(scores: UnitScores, couplings: list[tuple[Member, ...]]) -> list[np.ndarray]:
    """Scores that a user gave, checked against the couplings, which are read from them."""
    values = [np.asarray(x, np.float64) for x in scores.values]
    if len(values) != len(couplings):
        raise ValueError(
            f"scores must have values for each of its {len(couplings)} couplings, got {len(values)}"
        )
    for i, (members, value) in enumerate(zip(couplings, values, strict=True)):
        if value.shape != (members[0].units,):
            raise ValueError(
                f"scores: values[{i}] must have one score for each of {members[0].units} units, "
                f"got shape {value.shape}"
            )
        if not (np.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"scores: values[{i}] must be finite numbers of at least 0")
    return values
