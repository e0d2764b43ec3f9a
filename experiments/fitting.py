"""Fitting an inverse Fisher in sight of a user."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

import fishleg_jax as flj


def fit(
    estimator: flj.inverse.InverseFisher,
    params: Any,
    batches: Sequence[tuple],
    *,
    key: jax.Array,
    name: str,
    watch: Callable[[Any], None] = lambda state: None,
) -> Any:
    """Fits an estimator behind a progress bar and waits for it.

    Args:
        estimator: an inverse Fisher.
        params: the parameters.
        batches: what it sees.
        key: a random key.
        name: what the bar says.
        watch: called with the state after every update.

    Returns:
        The fitted state.
    """
    with tqdm(desc=f"fitting {name}", disable=None) as bar:

        def on_update(i, total, state):
            bar.total = total
            bar.update()
            watch(state)

        state = flj.fit(estimator, params, batches, key=key, on_update=on_update)
    return jax.block_until_ready(state)
