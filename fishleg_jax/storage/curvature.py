"""The diagonal of the Fisher where it is needed: at weights as they come back from the cells."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._batch import BatchLike, number_of_examples
from fishleg_jax._checks import arrays
from fishleg_jax.inverse.base import InverseFisher, check_on_host
from fishleg_jax.pruning.one_shot.checks import check_key
from fishleg_jax.pruning.one_shot.fit import fit
from fishleg_jax.storage.cells import Cell
from fishleg_jax.storage.coding import Coding, read, write


def fisher_under_noise(
    estimator: InverseFisher,
    params: Any,
    batches: Sequence[BatchLike],
    cells: Any,
    *,
    key: jax.Array,
    cell: Cell | None = None,
    coding: Coding | None = None,
) -> Any:
    """Diagonal of the Fisher, averaged over the noise of the cells: the best guide for `allot`.

    The quadratic model of the loss, `½ Σ Fᵢᵢ σᵢ² / nᵢ`, holds for small noise.  A trained network
    is nearly certain of most examples, and its Fisher that of a few others; under noise it is less
    certain, and all examples count.  So the mean of the Fisher is taken at weights that were
    written and read, with other noise for every batch.

    Args:
        estimator: Estimate with a `fisher_diagonal`, such as `inverse.diagonal(model)`.  It is
            fitted once to every batch.
        params: Weights, any pytree of floating-point arrays.
        batches: Batches of training data; `batches * 4` has four draws of the noise for each.
        cells: Number of cells for each weight as will be allotted, about: a whole number, or a
            pytree of integers like the weights, such as from `equal`.
        key: Random key of the noise and of the fits.
        cell: Memory cell; `pcm()` by default.
        coding: Coding of the weights; `Coding()` by default.

    Returns:
        Pytree like the weights, in nats per squared weight, float32 or better: the mean over the
        batches, by their numbers of examples.

    Raises:
        ValueError: An estimate without `fisher_diagonal`, arguments that `fit` or `write` reject,
            or a call under `jit`.

    References:
        Isik et al., Neural network compression for noisy storage devices, ACM TECS 2023, for the
        setting; the mean over the noise is this library's.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> from fishleg_jax import storage
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batch = jnp.array([[1.0, 0.0]]), jnp.ones(1)  # one gradient, (w₀ - 1, 0)
        >>> estimator = flj.inverse.diagonal(model, labels="empirical")
        >>> storage.fisher_under_noise(estimator, jnp.ones(2), [batch], 1, key=jax.random.key(0),
        ...                            cell=storage.gaussian(0.0)).tolist()
        [0.0, 0.0]
    """
    check_on_host(estimator)
    if estimator.fisher_diagonal is None:
        raise ValueError(
            f"estimator must have a fisher_diagonal, such as inverse.diagonal(model), got "
            f"{estimator}"
        )
    arrays.check_params(params)
    arrays.check_batches(batches)
    check_key(key)
    sums = jax.tree.map(lambda w: np.zeros(w.shape, np.float64), params)
    examples = 0
    for i, batch in enumerate(batches):
        writing, reading, fitting = jax.random.split(jax.random.fold_in(key, i), 3)
        stored = write(params, cells, writing, cell=cell, coding=coding)
        noisy = read(stored, reading)
        state = fit(estimator, noisy, [batch], key=fitting)
        found = jax.device_get(estimator.fisher_diagonal(state, noisy))
        number = number_of_examples(batch)
        sums = jax.tree.map(lambda s, x, n=number: s + n * np.asarray(x, np.float64), sums, found)
        examples += number
    return jax.tree.map(lambda s, w: jnp.asarray(s / examples, w.dtype), sums, _tree.widen(params))
