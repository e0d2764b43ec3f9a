"""Preconditioned conjugate gradients over pytrees, that stop at the first unsound number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._jit import is_traced, jitted


class Solve(NamedTuple):
    """A solve under way.

    Attributes:
        x: the solution so far.
        residual: `b − A x`.
        direction: the search direction.
        steepness: `rᵀ M r`, M the preconditioner.
        relative: `‖r‖ / ‖b‖`.
        iterations: how many products with A were used on directions.
        sound: False once a number was not finite or a curvature not positive; x stays before it.
    """

    x: Any
    residual: Any
    direction: Any
    steepness: jax.Array  # shape=(), float
    relative: jax.Array  # shape=(), float
    iterations: jax.Array  # shape=(), int32
    sound: jax.Array  # shape=(), bool


def conjugate_gradients(
    product: Callable[[Any], Any],
    precondition: Callable[..., Any],
    arguments: tuple,
    right: Any,
    x: Any,
    *,
    iterations: int,
    tolerance: float,
    on_iteration: Callable[[Solve], None] | None = None,
) -> Solve:
    """Solves `A x = b` for a positive definite A; its quadratic never rises from step to step.

    On the host this is a loop around compiled steps: XLA for the CPU runs the gradients of
    convolutions inside its own loops many times slower.  Under `jit` it is a `lax.while_loop`.

    Args:
        product: `v -> A v`.
        precondition: `(*arguments, r) -> M r`, M positive definite, near the inverse of A.
        arguments: arrays, or trees of them, that `precondition` is given.
        right: b, a pytree.
        x: where to start, a pytree like b: at the best multiple of it, of no higher quadratic than
            x itself or zero.
        iterations: how many at most.
        tolerance: on `‖b − A x‖ / ‖b‖`.
        on_iteration: called on the host with the solve at its start and after every iteration;
            under `jit` it is not.

    Returns:
        The last sound iterate.
    """
    scale = jitted(_norm)(right)
    state = jitted(_begin, precondition)(arguments, right, scale, x, product(x))

    def unfinished(state: Solve) -> jax.Array:
        return state.sound & (state.relative > tolerance) & (state.iterations < iterations)

    def advance(state: Solve) -> Solve:
        image = product(state.direction)
        return jitted(_advance, precondition)(arguments, scale, state, image)

    if is_traced(state):
        return jax.lax.while_loop(unfinished, advance, state)
    tell = on_iteration or (lambda state: None)
    tell(state)
    while bool(unfinished(state)):
        state = advance(state)
        tell(state)
    return state


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(_tree.dot(tree, tree))


def _relative(residual: Any, scale: jax.Array) -> jax.Array:
    # nothing on the right side: zero is the solution, and any residual is large beside it
    return _norm(residual) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def _begin(
    precondition: Callable, arguments: tuple, right: Any, scale: jax.Array, x: Any, image: Any
) -> Solve:
    # an x that is far too long, as single corrections added up may be, costs nothing to mend
    towards, curved = _tree.dot(right, x), _tree.dot(x, image)
    share = jnp.where(curved > 0, towards / jnp.where(curved > 0, curved, 1), 1)
    x, image = jax.tree.map(lambda a: share * a, (x, image))
    residual = jax.tree.map(jnp.subtract, right, image)
    direction = precondition(*arguments, residual)
    steepness = _tree.dot(residual, direction)
    relative = _relative(residual, scale)
    sound = jnp.isfinite(relative) & jnp.isfinite(steepness) & (steepness > 0)
    zero = jnp.zeros((), jnp.int32)
    return Solve(x, residual, direction, steepness, relative, zero, sound)


def _advance(
    precondition: Callable, arguments: tuple, scale: jax.Array, state: Solve, image: Any
) -> Solve:
    curvature = _tree.dot(state.direction, image)
    length = state.steepness / curvature
    x = jax.tree.map(lambda a, p: a + length * p, state.x, state.direction)
    residual = jax.tree.map(lambda r, a: r - length * a, state.residual, image)
    ahead = precondition(*arguments, residual)
    steepness = _tree.dot(residual, ahead)
    share = steepness / state.steepness
    direction = jax.tree.map(lambda z, p: z + share * p, ahead, state.direction)
    relative = _relative(residual, scale)
    forward = (curvature > 0) & jnp.isfinite(length) & jnp.isfinite(relative)
    sound = forward & jnp.isfinite(steepness) & (steepness > 0)
    moved = Solve(x, residual, direction, steepness, relative, state.iterations + 1, sound)
    return _tree.keep_where(forward, moved, state._replace(sound=jnp.zeros((), bool)))
