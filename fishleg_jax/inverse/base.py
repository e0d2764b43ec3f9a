"""The one protocol that every estimate of the damped inverse Fisher follows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax._devices import mesh, sharding
from fishleg_jax._devices import placement as _placement
from fishleg_jax._jit import jitted
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


def prepared(estimator: InverseFisher, state: Any, params: Any) -> Any:
    """A state for many products, see `InverseFisher.prepare`."""
    return state if estimator.prepare is None else jitted(estimator.prepare)(state, params)


def with_damping(state: Any, damping: Any) -> Any:
    """The state of an estimate at another damping.

    Args:
        state: State of an estimate that has a damping; if it was prepared, it no longer is.
        damping: γ in units of the Fisher per example, a number or an array of shape ().

    Returns:
        The state with that damping, of the dtype it had.

    Raises:
        ValueError: a state without a damping, such as that of `identity`.
    """
    if getattr(state, "damping", None) is None:
        raise ValueError(f"state must have a damping, got {type(state).__name__}")
    if getattr(state, "roots", None) is not None:
        state = state._replace(roots=None)
    return state._replace(damping=jnp.asarray(damping, jnp.result_type(state.damping)))


def apply_mask(tree: Any, mask: Any | None) -> Any:
    """A pytree with the entries outside a boolean mask set to zero; unchanged where it is None."""
    if mask is None:
        return tree
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask)


def spread(estimator: InverseFisher, *, model_outside: bool = False) -> InverseFisher:
    """The estimate with states and products that lie on the devices where the parameters do.

    Args:
        estimator: made of functions that know nothing of devices.
        model_outside: whether its `update` looks after Explicit axes by itself.
    """
    automatic = sharding.automatic

    @functools.wraps(estimator.init)  # whose maker the repr names
    def init(params):
        if all(mesh.sharding_of(x) is None for x in jax.tree.leaves(params)):
            return estimator.init(params)
        placement = placement_of(estimator, params)
        return jax.jit(lambda p: placement.of(estimator.init(p)), keep_unused=True)(params)

    def update(state, params, batch, key, mask=None):
        return automatic(estimator.update, state, state, params, batch, key, mask)

    def fisher_diagonal(state, params, mask=None):
        return at(estimator.fisher_diagonal, params, state, params, mask)

    def prepare(state, params):
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, params))
        shapes = jax.eval_shape(estimator.prepare, *bare)
        placement = _placement.placement_for(shapes, params)
        where = jax.tree.structure(shapes).unflatten(placement.leaves)
        return placement.of(automatic(estimator.prepare, where, state, params))

    def optional(function, like):
        if function is None:
            return None
        return lambda state, other: at(function, like(state, other), state, other)

    def at(function, like, *arguments):  # Auto axes, too, where they are known
        return _placement.like(automatic(function, like, *arguments), like)

    return estimator._replace(
        init=init,
        update=estimator.update if model_outside else update,
        multiply=lambda state, tangent, mask=None: at(
            estimator.multiply, tangent, state, tangent, mask
        ),
        diagonal=lambda state, params, mask=None: at(
            estimator.diagonal, params, state, params, mask
        ),
        fisher_diagonal=None if estimator.fisher_diagonal is None else fisher_diagonal,
        product=optional(estimator.product, lambda state, tangent: tangent),
        restrict=optional(estimator.restrict, lambda state, mask: state),
        prepare=None if estimator.prepare is None else prepare,
    )


def placement_of(estimator: InverseFisher, params: Any) -> _placement.Placement:
    """How a state of an estimate is spread."""
    return _placement.placement_for(jax.eval_shape(estimator.init, params), params)


def compiled(estimator: InverseFisher, params: Any) -> tuple[Callable, Callable]:
    """`init` and `update` of an estimate as a fit runs them: compiled, with states placed.

    Updates give up the state that they are handed.
    """
    placement = placement_of(estimator, params)
    return (
        jitted(_placement.placed, estimator.init, placement, keep_unused=True),
        jitted(_placement.placed, estimator.update, placement, donate=0),
    )


def identity() -> InverseFisher:
    """The inverse Fisher when nothing is known: with it OBS prunes by magnitude.

    Returns:
        An estimate that needs neither model nor data.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> estimator = flj.inverse.identity()
        >>> estimator.multiply(estimator.init(jnp.ones(2)), jnp.array([1.0, 2.0]))
        Array([1., 2.], dtype=float32)
    """
    return spread(
        InverseFisher(
            init=lambda params: (),
            update=lambda state, params, batch, key, mask=None: state,
            multiply=lambda state, tangent, mask=None: apply_mask(_tree.widen(tangent), mask),
            diagonal=lambda state, params, mask=None: apply_mask(
                jax.tree.map(lambda x: jnp.ones(x.shape, _tree.wide_dtype(x.dtype)), params), mask
            ),
            updates=0,
        )
    )
