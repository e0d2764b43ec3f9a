"""The system of the group update: right side, damped products, preconditioner, first damping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _random, _tree
from fishleg_jax._conjugate_gradients import Solve, conjugate_gradients
from fishleg_jax._devices import sharding
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher, movable_damping, with_damping
from fishleg_jax.pruning.compensation._independent import scaled


class System(NamedTuple):
    """System `(F_KK + γ) x = b` for the change x of the kept weights K that may move.

    Attributes:
        params: Weights.
        new_mask: Masks of the kept weights.
        free: Masks of K.
        right: Right side b.
        start: Where a solve begins.
        fisher_product: Function from a vector to its undamped product with the Fisher.
        estimator: Estimate of the inverse Fisher, the preconditioner.
        state: State of the estimate.
        factored: The same, prepared for many products.
    """

    params: Any
    new_mask: Any
    free: Any
    right: Any
    start: Any
    fisher_product: Callable[[Any], Any]
    estimator: InverseFisher
    state: Any
    factored: Any

    def solve(
        self,
        x: Any,
        gamma: jax.Array,
        *,
        iterations: int,
        tolerance: float,
        on_iteration: Callable[[Solve], bool],
        on_product: Callable[[Any, Any], None] | None = None,
    ) -> Solve:
        """Solves from x at a damping, preconditioned at the same one where that is cheap."""
        inverse = self.factored
        if not is_traced((self.right, self.state)) and movable_damping(self.state):
            inverse = prepared(self.estimator, with_damping(self.state, gamma), self.params)

        def product(v):
            image = jitted(damped)(self.fisher_product(v), v, gamma, self.free)
            if on_product is not None:
                on_product(v, image)
            return image

        return conjugate_gradients(
            product,
            jitted(precondition, self.estimator),
            (inverse, self.free),
            self.right,
            x,
            iterations=iterations,
            tolerance=tolerance,
            on_iteration=on_iteration,
        )

    def change(self, x: Any, share: float | jax.Array = 1.0) -> Any:
        """Change of all weights: a share of x, and pruned weights to zero."""
        return scaled(self.params, x, self.new_mask, share)


def moved(params: Any, x: Any, new_mask: Any) -> Any:
    """Weights after the whole change x of kept weights, with the pruned ones at zero."""
    return jax.tree.map(jnp.add, params, scaled(params, x, new_mask, 1.0))


def direct(estimator: InverseFisher, state: Any, mask: Any, gamma: jax.Array, right: Any) -> Any:
    """Product of `(F_KK + γ)⁻¹`, by the estimate's own gradients, with the right side."""
    kept = with_damping(estimator.restrict(state, mask), gamma)
    return estimator.multiply(kept, right, mask)


def random_signs(params: Any, mask: Any) -> Any:
    """Fixed random signs on K and zeros elsewhere, in the dtypes of the weights."""
    leaves, tree = jax.tree.flatten(params)

    def draw(leaves, masks):
        drawn = _random.like(leaves, jax.random.key(0), _random.signs)
        return [jnp.where(m, x, 0) for x, m in zip(drawn, masks, strict=True)]

    return tree.unflatten(sharding.automatic(draw, leaves, leaves, jax.tree.leaves(mask)))


def mean_diagonal(signs: Any, image: Any, mask: Any) -> jax.Array:
    """Estimate of the mean of F's diagonal on K, `zᵀFz / |K|` for random signs z (Hutchinson)."""
    size = sum(jnp.sum(m.astype(jnp.float32)) for m in jax.tree.leaves(mask))
    tiny = jnp.finfo(jnp.float32).tiny ** 0.5
    return jnp.maximum(_tree.dot(signs, image) / jnp.maximum(size, 1), tiny)


def right_side(image: Any, gradient: Any, mask: Any) -> Any:
    """Right side `F_KS w_S − g_K`, from the image `−F E_S w_S` of pruning S and the gradient."""
    return apply_mask(jax.tree.map(lambda f, g: -f - g, image, gradient), mask)


def damped(image: Any, vector: Any, gamma: jax.Array, mask: Any) -> Any:
    """Damped product `F_KK v + γ v`, from the image `F v`."""
    return apply_mask(jax.tree.map(lambda f, v: f + gamma * v, image, vector), mask)


def precondition(estimator: InverseFisher, state: Any, mask: Any, residual: Any) -> Any:
    """Product of the estimate of the inverse, cut to K, with a residual."""
    return estimator.multiply(state, residual, mask)


def relative_residual(right: Any, x: Any, image: Any, gamma: jax.Array, mask: Any) -> jax.Array:
    """Residual `‖b − (F_KK + γ) x‖ / ‖b‖` of a solution with the image `F x`."""
    residual = jax.tree.map(jnp.subtract, right, damped(image, x, gamma, mask))
    size = jnp.maximum(_tree.dot(right, right), jnp.finfo(jnp.float32).tiny)
    return jnp.sqrt(_tree.dot(residual, residual) / size)
