"""The one protocol that every estimate of the damped inverse Fisher follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax.inverse._functions import Product, Update
from fishleg_jax.model import Model


class InverseFisher(NamedTuple):
    """An estimate of `F_γ⁻¹ = (F + γI)⁻¹` as pure functions, like an optax transformation.

    A state is a pytree of arrays: it goes through `jit`, `vmap`, sharding and checkpoints.  The
    functions work in float32 or better whatever the parameters are.  Mind that
    `(F⁻¹)_KK ≠ (F_KK)⁻¹`: `multiply` is an inverse only for the mask that `update` saw.

    Attributes:
        init: `(params) -> state`, from shapes and dtypes only.
        update: `(state, params, batch, key, mask=None) -> state`: assimilates one batch.  `mask` is
            a boolean pytree like the parameters, False for pruned weights.
        multiply: `(state, tangent, mask=None) -> tangent`: `E_K Q E_Kᵀ v`.
        diagonal: `(state, params, mask=None) -> tangent`: the diagonal of Q; `params` gives tree
            and shapes.
        updates: how many updates a one-shot fit makes; it goes through its batches as often as that
            needs.  None for one pass.
        product: `(state, tangent) -> tangent`: the undamped `F v` that Q is the damped inverse of;
            None where the estimate has none in memory.
        restrict: `(state, mask) -> state`: the state of `F_KK`, for whose mask `multiply` then is
            the exact inverse; None where that takes a new fit.
        prepare: `(state, params) -> state`: the same inverse, cheaper for many products and
            diagonals, but not to be updated or given another damping; `params` gives tree and
            shapes.  None where that would save little.
        ready: `(state) -> boolean scalar`, jit-compatible: whether as many batches were assimilated
            as the estimate needs to be of any use.  None where that is one.
        axis_name: a named axis over whose devices `update` averages what it finds in the batch of
            each; None where all there is to know is in the batch.
        model: the model whose Fisher is estimated, by which the labels of batches are checked; None
            where there is none.  The pruning refuses to prune another one.
        fisher_diagonal: `(state, params, mask=None) -> tangent`: the diagonal of the undamped
            Fisher as the estimate knows it; `params` gives tree and shapes.  None where it knows
            of none.
        gradients: number of gradients that a fit has to see before it is `ready`; None where that
            is no number of gradients.
        examples_per_gradient: number of examples in each of these; of single ones `predict` must
            not depend on an example's neighbours in the batch.  None where the estimate works on
            batches as they come.
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

    def __repr__(self) -> str:
        """One line: the function that made it, and what it has beside the necessary."""
        return _text.by_maker(self)


def check_estimator(estimator: Any) -> None:
    """Raises a ValueError unless it is an inverse Fisher."""
    if not isinstance(estimator, InverseFisher):
        raise ValueError(
            "estimator must be an InverseFisher, such as flj.inverse.fishleg(model), got "
            f"{estimator!r}"
        )


def check_on_host(estimator: Any) -> None:
    """Raises a ValueError unless it is an inverse Fisher that can be fitted outside of an axis."""
    check_estimator(estimator)
    if estimator.axis_name is not None:
        raise ValueError(
            f"estimator has axis_name={estimator.axis_name!r}, which is for updates inside "
            "shard_map or pmap; leave it out here, where arrays may be spread over devices"
        )


def with_damping(state: Any, damping: Any) -> Any:
    """The state of an estimate at another damping.

    Args:
        state: State of an estimate that has a damping; if it was prepared, it no longer is.
        damping: γ in units of the Fisher per example, a number or an array of shape ().

    Returns:
        The state with that damping, of the dtype it had.

    Raises:
        ValueError: a state without a damping, such as that of `identity`, or one whose damping is
            part of the fit, as WoodFisher's in blocks no larger than its number of gradients.

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
    if getattr(state, "fixed_damping", False):
        raise ValueError(
            "state has its damping in square roots since the fit: fit the estimator anew, "
            "with another damping, or use mfac"
        )
    if getattr(state, "roots", None) is not None:
        state = state._replace(roots=None)
    return state._replace(damping=jnp.asarray(damping, jnp.result_type(state.damping)))
