"""The protocol that all estimators of the damped inverse Fisher implement."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._checks import numbers
from fishleg_jax._jit import is_traced
from fishleg_jax.inverse._functions import Product, Update
from fishleg_jax.model import Model


class InverseFisher(NamedTuple):
    """An estimator of `F_γ⁻¹ = (F + γI)⁻¹` as pure functions, like an optax transformation.

    The state is a pytree of arrays that goes through `jit`, `vmap`, sharding and checkpoints.  The
    functions compute in float32 or better for any dtype of the parameters.  Note that
    `(F⁻¹)_KK ≠ (F_KK)⁻¹`: `multiply` is an inverse only for the mask given to `update`.

    Attributes:
        init: Function `(params) -> state`, which uses shapes and dtypes only.
        update: Function `(state, params, batch, key, mask=None) -> state` that assimilates one
            batch.  `mask` is a boolean pytree like the parameters, False for pruned weights.
        multiply: Function `(state, tangent, mask=None) -> tangent` that returns `E_K Q E_Kᵀ v`.
        diagonal: Function `(state, params, mask=None) -> tangent` that returns the diagonal of Q;
            `params` provides structure and shapes.
        updates: Number of updates of a one-shot fit, which cycles through its batches until it is
            reached.  None for one pass over the batches.
        product: Function `(state, tangent) -> tangent` that returns the undamped `F v` whose damped
            inverse is Q; None if the state does not hold F.
        restrict: Function `(state, mask) -> state` that returns the state of `F_KK`, for whose mask
            `multiply` is then the exact inverse; None if that takes a new fit.
        prepare: Function `(state, params) -> state` that returns the same inverse with cheaper
            products and diagonals; do not update it or change its damping.  `params` provides
            structure and shapes.  None if that would save little.
        ready: Function `(state) -> boolean scalar`, jit-compatible: whether the state has
            assimilated enough batches to be usable.  None if one batch is enough.
        axis_name: Named axis of devices over which `update` averages, each with its own batch; None
            if `update` is given the whole batch.
        model: Model whose Fisher is estimated, used to check the labels of batches; pruning another
            model raises an error.  None for an estimator without a model.
        fisher_diagonal: Function `(state, params, mask=None) -> tangent` that returns the estimated
            diagonal of the undamped Fisher; `params` provides structure and shapes.  None if the
            state does not determine it.
        gradients: Number of gradients a fit must see before it is `ready`; None if readiness does
            not depend on a number of gradients.
        examples_per_gradient: Number of examples averaged into one gradient; with 1, `predict` must
            not depend on an example's neighbours in the batch.  None if the estimator uses whole
            batches.
        examples: Number of examples that a one-shot fit without `updates` sees at least: it cycles
            through batches that have fewer.  A batch counts for at most a quarter of it, so that
            a fit has four updates or more.  None for one pass over the batches.
        carry: Function `(state) -> state` that discounts what a state has seen to a quarter, so
            that a quarter of a fit at other weights or masks counts for half.  None if states are
            not carried on.
        settled: Function `(state) -> boolean scalar`, jit-compatible: whether further updates at
            the same weights are not expected to help; a one-shot fit ends there.  None for fits of
            a fixed length.
        blocks: Function `(state, tangent, tiles, fisher)`, jit-compatible, that returns for every
            leaf the blocks of Q, or if `fisher` is True those of the undamped Fisher, for the tiles
            that a pattern cuts it into, as `_blocks.Pieces`.  `tiles` has the shape of a tile for
            every leaf, None for a leaf without.  Where it returns None, and if this field is None,
            blocks count as diagonal.
    """

    init: Callable[[Any], Any]
    update: Update
    multiply: Product
    diagonal: Product
    updates: int | None = None
    product: Callable[[Any, Any], Any] | None = None
    restrict: Callable[[Any, Any], Any] | None = None
    prepare: Callable[[Any, Any], Any] | None = None
    ready: Callable[[Any], jax.Array] | None = None
    axis_name: str | None = None
    model: Model | None = None
    fisher_diagonal: Callable[..., Any] | None = None
    gradients: int | None = None
    examples_per_gradient: int | None = None
    examples: int | None = None
    carry: Callable[[Any], Any] | None = None
    settled: Callable[[Any], jax.Array] | None = None
    blocks: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        """Returns one line: the function that built it, and the optional fields that are set."""
        return _text.by_maker(self)


def check_estimator(estimator: Any) -> None:
    """Raises a ValueError unless `estimator` is an `InverseFisher`."""
    if not isinstance(estimator, InverseFisher):
        raise ValueError(
            "estimator must be an InverseFisher, such as flj.inverse.fishleg(model), got "
            f"{_text.shown(estimator)}"
        )


def check_on_host(estimator: Any) -> None:
    """Raises a ValueError unless it is an `InverseFisher` without a named axis."""
    check_estimator(estimator)
    if estimator.axis_name is not None:
        raise ValueError(
            f"estimator has axis_name={estimator.axis_name!r}, which is for updates inside "
            "shard_map or pmap; leave it out here, where arrays may be sharded over devices"
        )


def movable_damping(state: Any) -> bool:
    """Whether `with_damping` can change the damping of a state."""
    return getattr(state, "damping", None) is not None and not getattr(
        state, "fixed_damping", False
    )


def with_damping(state: Any, damping: Any) -> Any:
    """Returns the state of an estimator with another damping.

    Args:
        state: State of an estimator with a damping; if it was prepared, it no longer is.
        damping: Damping γ in units of the Fisher per example, a number or an array of shape ().

    Returns:
        State with the new damping, in the dtype of the old one.

    Raises:
        ValueError: A damping that is not a positive number, unless it is traced; a state without a
            damping, such as that of `identity`, or one whose damping is part of the fit, as
            WoodFisher's in blocks no larger than its number of gradients.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> estimator, batch = flj.inverse.diagonal(model, damping=1.0), (jnp.ones((8, 2)), None)
        >>> state = flj.fit(estimator, jnp.ones(2), [batch], key=jax.random.key(0))
        >>> float(flj.inverse.with_damping(state, 3.0).damping)
        3.0
    """
    if getattr(state, "damping", None) is None:
        raise ValueError(f"state must have a damping, got {type(state).__name__}")
    if not is_traced(damping):
        array = isinstance(damping, jax.Array) and damping.ndim == 0
        numbers.check_positive(float(damping) if array else damping, "damping")
    if getattr(state, "fixed_damping", False):
        raise ValueError(
            "state contains square roots for the damping of its fit: fit the estimator again with "
            "the new damping, or use mfac"
        )
    if getattr(state, "roots", None) is not None:
        state = state._replace(roots=None)
    return state._replace(damping=jnp.asarray(damping, jnp.result_type(state.damping)))
