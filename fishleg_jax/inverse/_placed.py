"""Estimators sharded like the parameters, and compiled as `fit` runs them."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax._devices import mesh, sharding
from fishleg_jax._devices import placement as _placement
from fishleg_jax._jit import jitted, shapes_of
from fishleg_jax.inverse.base import InverseFisher


def prepared(estimator: InverseFisher, state: Any, params: Any) -> Any:
    """Returns the state prepared for many products, if the estimator supports it."""
    return state if estimator.prepare is None else jitted(estimator.prepare)(state, params)


def spread(estimator: InverseFisher, *, model_outside: bool = False) -> InverseFisher:
    """Wraps an estimator so that its states and products are sharded like the parameters.

    Args:
        estimator: Estimator whose functions do not handle devices.
        model_outside: Whether its `update` handles Explicit axes itself (default False).
    """
    automatic = sharding.automatic

    @functools.wraps(estimator.init)  # the repr reads the estimator's name from it
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
        # place the prepared state by its shapes, computed without shardings
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, params))
        shapes = jax.eval_shape(estimator.prepare, *bare)
        placement = _placement.placement_for(shapes, params)
        where = jax.tree.structure(shapes).unflatten(placement.leaves)
        return placement.of(automatic(estimator.prepare, where, state, params))

    def optional(function, like):
        if function is None:
            return None
        return lambda state, other: at(function, like(state, other), state, other)

    def at(function, like, *arguments):  # also places results on known Auto axes
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
    """Sharding of an estimator's state for these parameters."""
    return _placement.placement_for(shapes_of(jitted(estimator.init), params), params)


def compiled(estimator: InverseFisher, params: Any) -> tuple[Callable, Callable]:
    """Returns `init` and `update` as `fit` runs them: compiled, with sharded states.

    The state is donated to `update`; copy anything that is needed afterwards.
    """
    placement = placement_of(estimator, params)
    return (
        jitted(_placement.placed, estimator.init, placement, keep_unused=True),
        jitted(_placement.placed, estimator.update, placement, donate=0),
    )
