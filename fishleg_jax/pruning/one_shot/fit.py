"""Fits an inverse Fisher to batches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fishleg_jax import _tree
from fishleg_jax._checks import arrays
from fishleg_jax._devices import mesh
from fishleg_jax.inverse._placed import compiled
from fishleg_jax.inverse.base import InverseFisher, check_on_host
from fishleg_jax.model import BatchLike, check_all_targets
from fishleg_jax.pruning import _soundness
from fishleg_jax.pruning.one_shot.checks import check_functions, check_key


@mesh.in_mesh_of_params
def fit(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[BatchLike],
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
        on_update: called as `on_update(updates done, updates in all, state)` after every update;
            the next update takes the state's memory, so what is to be kept has to be copied.

    Returns:
        The estimator's state.

    Raises:
        ValueError: unsound weights or batches, see `prune_one_shot`; no estimator, no random key;
            a `predict` that depends on an example's neighbours, where the estimate needs gradients
            of single examples.

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
    if masks is not None:
        _tree.check_same(params, masks, "masks")
    check_all_targets(estimator.model, params, batches, "batches")
    if estimator.model is not None:
        _soundness.check_single_examples(estimator, estimator.model, params, batches)
    return fitted(estimator, params, batches, key, masks, on_update)


def fitted(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[BatchLike],
    key: jax.Array,
    masks: Any | None,
    on_update: Callable[[int, int, Any], None] | None,
) -> Any:
    """What `fit` returns, of arguments that are checked."""
    total = len(batches) if estimator.updates is None else estimator.updates
    # a state may be as large as memory allows, so each makes room for the next; compiled, `init`
    # gives every leaf memory of its own
    init, update = compiled(estimator, params)
    state = init(params)
    for i in range(total):
        state = update(state, params, batches[i % len(batches)], jax.random.fold_in(key, i), masks)
        if on_update is not None:
            on_update(i + 1, total, state)
    return state
