"""Fits an inverse Fisher to batches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax._batch import number_of_examples
from fishleg_jax._checks import arrays
from fishleg_jax._devices import mesh
from fishleg_jax.inverse._placed import compiled
from fishleg_jax.inverse.base import InverseFisher, check_on_host
from fishleg_jax.model import BatchLike, check_all_targets
from fishleg_jax.pruning import _soundness
from fishleg_jax.pruning.masks.groups import check_masks
from fishleg_jax.pruning.one_shot.checks import check_functions, check_key

LOOK = 16  # updates between looks at whether a fit has settled


@mesh.in_mesh_of_params
def fit(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[BatchLike],
    *,
    key: jax.Array,
    masks: Any | None = None,
    on_update: Callable[[int, int, Any], None] | None = None,
    state: Any | None = None,
) -> Any:
    """Fits an inverse Fisher to batches: `estimator.updates` updates, or one pass over the batches.

    Without `updates`, batches with fewer examples than `estimator.examples` are passed again.  A
    fit of an estimator that learns ends earlier, once it has `settled`.

    Args:
        estimator: Estimate of the inverse Fisher.
        params: Weights, any pytree of floating-point arrays.
        batches: Batches of training data; equal shapes save compilations.
        key: Random key.
        masks: Pytree of booleans like the weights, False for pruned; None keeps all.
        on_update: Function `(updates done, updates in all, state)`, called after every update.  The
            state is donated to the next update; copy anything you want to keep.  None for no calls.
        state: State of the estimator at other weights or masks to carry on from, in a quarter of
            the updates of a fit, on the first batches.  None for a fit from scratch.

    Returns:
        State of the estimator.

    Raises:
        ValueError: A state where the estimator does not carry states on; invalid weights or
            batches, under the conditions of `prune_one_shot`; an invalid estimator or random key; a
            `predict` that depends on an example's neighbours, where the estimate needs gradients of
            single examples.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> flj.fit(flj.inverse.identity(), jnp.ones(2), [(jnp.ones((1, 2)), None)],
        ...         key=jax.random.key(0))
        ()
    """
    check_on_host(estimator)
    arrays.check_params(params)
    arrays.check_batches(batches)
    check_key(key)
    check_functions(on_update=on_update)
    if state is not None and estimator.carry is None:
        raise ValueError(f"state must be None for {estimator}, which carries no state on")
    if masks is not None:
        check_masks(params, masks)
    # estimates that take gradients of examples do so under Auto axes, with a plain model
    names_axes = estimator.examples_per_gradient is None
    check_all_targets(estimator.model, params, batches, "batches", names_axes)
    if estimator.model is not None:
        _soundness.check_single_examples(estimator, estimator.model, params, batches)
    return fitted(estimator, params, batches, key, masks, on_update, state)


def fitted(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[BatchLike],
    key: jax.Array,
    masks: Any | None,
    on_update: Callable[[int, int, Any], None] | None,
    state: Any | None = None,
) -> Any:
    """State that `fit` returns, from arguments that are already checked."""
    total = number_of_updates(estimator, batches)
    # A state may be as large as memory allows, so each is donated to the next.  Compiled, `init`
    # gives every leaf memory of its own.
    init, update = compiled(estimator, params)
    if state is None:
        state = init(params)
    else:
        total = -(-total // 4)
        state = estimator.carry(jax.tree.map(jnp.copy, state))
    for i in range(total):
        state = update(state, params, batches[i % len(batches)], jax.random.fold_in(key, i), masks)
        if on_update is not None:
            on_update(i + 1, total, state)
        if _has_settled(estimator, state, i + 1):
            break
    return state


def _has_settled(estimator: InverseFisher, state: Any, updates: int) -> bool:
    """Whether a fit can end, looked at now and then, since that waits for the updates."""
    if estimator.settled is None or updates % LOOK:
        return False
    return bool(jax.device_get(estimator.settled(state)))


def number_of_updates(estimator: InverseFisher, batches: Sequence[BatchLike]) -> int:
    """Number of updates of a fit to batches."""
    if estimator.updates is not None:
        return estimator.updates
    if estimator.examples is None:
        return len(batches)
    # a large batch counts for a part only: the samples taken from one are limited
    sizes = [min(number_of_examples(batch), estimator.examples // 4) for batch in batches]
    total, seen = len(batches), sum(sizes)
    while 0 < seen < estimator.examples:
        seen += sizes[total % len(sizes)]
        total += 1
    return total
