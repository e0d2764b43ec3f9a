"""The diagonal of the Fisher, which turns OBS into Optimal Brain Damage."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._gradients import check_damping, sum_over_rows
from fishleg_jax.inverse._placed import spread
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model, check_model


class DiagonalState(NamedTuple):
    """State of `diagonal`.

    Attributes:
        count: Number of gradients seen.
        skipped: Number of gradients ignored because they were not finite.
        damping: Damping γ; may be changed at any time.
        squares: Sum of squared gradients, a pytree like the parameters.
    """

    count: jax.Array  # shape=(), int32
    skipped: jax.Array  # shape=(), int32
    damping: jax.Array  # shape=(), float
    squares: Any

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def diagonal(
    model: Model,
    damping: float = 1e-3,
    *,
    labels: str = "sampled",
    examples_per_gradient: int = 1,
    examples_per_chunk: int | None = None,
) -> InverseFisher:
    """The estimate `1 / (diag F + γ)`, from mean squares of per-example gradients.

    Args:
        model: Model whose Fisher is estimated.
        damping: Damping γ in units of the Fisher per example.
        labels: Source of the labels: `sampled` (default) from the model for the true Fisher, or
            `empirical` for those of the data.
        examples_per_gradient: Number of examples averaged into one gradient.
        examples_per_chunk: Number of examples whose gradients are held at a time, which bounds
            memory; None for the whole batch.

    Returns:
        An `InverseFisher` whose state is a `DiagonalState`.  A fit makes one pass over its batches.

    Raises:
        ValueError: An argument out of range.

    References:
        LeCun, Denker & Solla, Optimal brain damage, NIPS 1989.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batch = jnp.array([[1.0, 0.0]]), jnp.ones(1)  # one gradient, (-1, 0)
        >>> estimator = flj.inverse.diagonal(model, damping=1.0, labels="empirical")
        >>> state = flj.fit(estimator, jnp.zeros(2), [batch], key=jax.random.key(0))
        >>> estimator.diagonal(state, jnp.zeros(2)).round(5)
        Array([0.5, 1. ], dtype=float32)
    """
    check_model(model)
    check_damping(damping)
    total_of = sum_over_rows(model, labels, examples_per_gradient, examples_per_chunk)

    def init(params):
        wide = _tree.widen(params)
        dtype = jnp.result_type(*jax.tree.leaves(wide))
        zero = jnp.zeros((), jnp.int32)
        squares = jax.tree.map(jnp.zeros_like, wide)
        return DiagonalState(zero, jnp.zeros_like(zero), jnp.asarray(damping, dtype), squares)

    def update(state, params, batch, key, mask=None):
        # add the squared gradients of the batch, chunk by chunk
        def squares(rows):
            return [jnp.sum(x**2, axis=0) for x in rows.leaves]

        new, gradients, skipped = total_of(params, batch, key, mask, squares)
        new = jax.tree.structure(params).unflatten(new)
        return state._replace(
            count=state.count + gradients,
            skipped=state.skipped + skipped,
            squares=jax.tree.map(jnp.add, state.squares, new),
        )

    # the undamped diagonal of the Fisher, and its damped inverse
    def mean_squares(state):
        count = jnp.maximum(state.count - state.skipped, 1)
        return jax.tree.map(lambda s: s / count, state.squares)

    def inverse(state, mask):
        values = jax.tree.map(lambda f: 1 / (f + state.damping), mean_squares(state))
        return apply_mask(values, mask)

    def multiply(state, tangent, mask=None):
        return jax.tree.map(jnp.multiply, inverse(state, mask), _tree.widen(tangent))

    return spread(
        InverseFisher(
            init,
            update,
            multiply,
            diagonal=lambda state, params, mask=None: inverse(state, mask),
            model=model,
            fisher_diagonal=lambda state, params, mask=None: apply_mask(mean_squares(state), mask),
            examples_per_gradient=examples_per_gradient,
        )
    )
