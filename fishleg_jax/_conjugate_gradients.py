"""Preconditioned conjugate gradients over pytrees, stopped at the first invalid number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax._jit import is_traced, jitted


class Solve(NamedTuple):
    """State of a solve.

    Attributes:
        x: Current solution.
        residual: Residual `b − A x`.
        direction: Search direction.
        steepness: Product `rᵀ M r`, M the preconditioner.
        relative: Relative residual `‖r‖ / ‖b‖`.
        iterations: Number of iterations, each with one product with A.
        sound: Whether all numbers so far were finite and all curvatures positive; once False, x
            stays at its last sound value.
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
    on_iteration: Callable[[Solve], bool | None] | None = None,
) -> Solve:
    """Solves `A x = b` for a positive definite A; the quadratic never increases between steps.

    On the host this is a loop around compiled steps: XLA for the CPU runs the gradients of
    convolutions inside its own loops many times slower.  Under `jit` it is a `lax.while_loop`.

    Args:
        product: Function `v -> A v`.
        precondition: Function `(*arguments, r) -> M r`, M positive definite, near the inverse of A.
        arguments: Arrays, or pytrees of arrays, passed to `precondition`.
        right: Right-hand side b, a pytree.
        x: Initial guess, a pytree like b, rescaled to its best multiple, whose quadratic is at most
            that of x and of zero.
        iterations: Maximum number of iterations.
        tolerance: Relative residual `‖b − A x‖ / ‖b‖` at which to stop.
        on_iteration: Callback `(solve)`, called on the host at the start and after every iteration,
            which ends the solve if it returns True; not called under `jit`.  None to skip.

    Returns:
        State at the last sound iterate.
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
    look = on_iteration or (lambda state: False)
    ended = look(state)
    while not ended and bool(unfinished(state)):
        state = advance(state)
        ended = look(state)
    return state


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(_tree.dot(tree, tree))


def _relative(residual: Any, scale: jax.Array) -> jax.Array:
    # for b = 0 the solution is zero, and any residual is large relative to it
    return _norm(residual) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def _begin(
    precondition: Callable, arguments: tuple, right: Any, scale: jax.Array, x: Any, image: Any
) -> Solve:
    # rescale x: a sum of separate corrections may be far too long, and fixing it costs nothing
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
    return optax.tree.where(forward, moved, state._replace(sound=jnp.zeros((), bool)))
