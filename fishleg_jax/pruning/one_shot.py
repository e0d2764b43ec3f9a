"""One-shot pruning: fit an inverse Fisher to batches, score, mask, compensate."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree, _validate, fisher
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Batch, Model, predict
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning import masks as _masks
from fishleg_jax.pruning.report import Report, make_report
from fishleg_jax.pruning.saliency import obs_saliency


class Result(NamedTuple):
    """What `prune_one_shot` returns.

    Attributes:
        params: the pruned and compensated weights, of the dtypes that came in; pruned ones are 0.0.
        masks: a pytree of booleans, False for pruned weights.
        report: a row for every prunable leaf and a total; print it.
        state: the state of the inverse Fisher, to use again at another sparsity.
    """

    params: Any
    masks: Any
    report: Report
    state: Any


def fit(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[Batch],
    *,
    key: jax.Array,
    masks: Any | None = None,
    on_update: Callable[[int, int, Any], None] | None = None,
) -> Any:
    """Fits an inverse Fisher to batches: `estimator.updates` updates, or one pass over them.

    Args:
        estimator: the estimate.
        params: weights, any pytree of floating-point arrays.
        batches: batches of training data; equal shapes save compilations.
        key: a random key.
        masks: which weights survive; None for all.
        on_update: called as `on_update(updates done, updates in all, state)` after every update.

    Returns:
        The estimator's state.

    Raises:
        ValueError: unsound weights or batches, see `prune_one_shot`.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> flj.fit(flj.inverse.identity(), jnp.ones(2), [(jnp.ones((1, 2)), None)],
        ...         key=jax.random.key(0))
        ()
    """
    _validate.check_params(params)
    _validate.check_batches(batches)
    if masks is not None:
        _tree.check_same(params, masks, "masks")
    total = len(batches) if estimator.updates is None else estimator.updates
    update = jitted(estimator.update)
    state = estimator.init(params)
    for i in range(total):
        state = update(state, params, batches[i % len(batches)], jax.random.fold_in(key, i), masks)
        if on_update is not None:
            on_update(i + 1, total, state)
    return state


def prune_one_shot(
    model: Model,
    params: Any,
    estimator: InverseFisher,
    batches: Sequence[Batch],
    *,
    sparsity: float,
    scope: str = "global",
    compensation: _compensation.Compensation | None = None,
    prunable: _tree.Selection = None,
    key: jax.Array | None = None,
    state: Any | None = None,
    on_update: Callable[[int, int, Any], None] | None = None,
) -> Result:
    """Prunes a trained model once, by Optimal Brain Surgeon with an estimate of the inverse Fisher.

    Args:
        model: the model; the curvature of the loss that it makes is handed to the compensation.
        params: its trained weights, any pytree of floating-point arrays.
        estimator: the inverse Fisher; `inverse.identity()` makes this magnitude pruning.
        batches: batches of training data for the curvature, never of the data reported on.
        sparsity: the fraction of the n prunable weights to prune, in [0, 1): `floor(sparsity · n)`.
        scope: `global` for one threshold over all prunable leaves, `layer` for one in each.
        compensation: what kept weights do about it; `compensation.independent()` by default.
        prunable: regular expressions over key paths, or a predicate `(name, leaf) -> bool`; by
            default every leaf of two or more dimensions.
        key: a random key; `jax.random.key(0)` by default.
        state: a fitted state of the estimator at these weights, to skip the fit.
        on_update: see `fit`.

    Returns:
        Weights, masks, a report and the estimator's state.

    Raises:
        ValueError: a sparsity outside [0, 1), NaN or infinity in weights or batches, an empty or
            mismatched batch, an integer leaf, nothing prunable, an expression that matches nothing.
        FloatingPointError: predictions, the fitted inverse or the pruned weights are not finite.

    References:
        McGowan et al., Efficient model compression techniques with FishLeg, 2024.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> weights = jnp.array([[3.0], [0.1], [2.0], [0.2]])
        >>> batch = (jax.random.normal(jax.random.key(0), (100, 4)), None)
        >>> result = flj.prune_one_shot(model, weights, flj.inverse.fishleg(model), [batch],
        ...                             sparsity=0.5)
        >>> result.masks[:, 0].tolist()
        [True, False, True, False]
    """
    _validate.check_params(params)
    _validate.check_batches(batches)
    _masks.number_to_prune(sparsity, 1)
    chosen = _tree.select(params, prunable, "prunable")
    if scope not in _masks.SCOPES:
        raise ValueError(f"scope must be one of {', '.join(_masks.SCOPES)}, got {scope!r}")
    compensation = _compensation.independent() if compensation is None else compensation
    key = jax.random.key(0) if key is None else key
    if estimator.updates != 0:
        _check_model(model, params, batches[0])
    if state is None:
        state = fit(estimator, params, batches, key=key, on_update=on_update)
    elif not _alike(state, jax.eval_shape(estimator.init, params)):
        raise ValueError(
            "state must be one of this estimator for these params; it has other shapes"
        )

    everything = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    scores = obs_saliency(params, jitted(estimator.diagonal)(state, params))
    _require_finite(scores, "the diagonal of the inverse Fisher")
    new_masks = _masks.make_masks(scores, sparsity, scope=scope, prunable=prunable)
    curvature = fisher.curvature(model, batches)
    delta, _ = compensation(params, everything, new_masks, curvature, estimator, state)
    pruned = jax.tree.map(lambda p, d: (p + d).astype(p.dtype), params, delta)
    pruned = _masks.apply_masks(pruned, new_masks)
    _require_finite(pruned, "the compensated weights")
    return Result(pruned, new_masks, make_report(scores, everything, new_masks, chosen), state)


def _alike(state: Any, expected: Any) -> bool:
    """Whether two states have one structure and the same shapes."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
    return all(jnp.shape(a) == b.shape for a, b in pairs)


def _check_model(model: Model, params: Any, batch: Batch) -> None:
    """Raises where a model can't predict a batch, or predicts NaN or infinity."""
    try:
        outputs = jitted(predict, model)(params, batch)
    except (TypeError, ValueError) as error:
        raise ValueError(f"batches[0] does not fit the model: {error}") from error
    if not bool(_tree.all_finite(outputs)):
        raise FloatingPointError("the model predicts NaN or infinity on batches[0]")


def _require_finite(tree: Any, what: str) -> None:
    for name, leaf in _tree.named_leaves(tree):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise FloatingPointError(
                f"{what} has NaN or infinite values at {name!r}, so nothing was pruned; "
                "a larger damping helps"
            )
