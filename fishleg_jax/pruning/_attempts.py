"""Solves of the group update with one damping after the other, on the host or under `jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree

RAISE = 4.0  # times which the damping is raised where the full step was not the best


class Attempt(NamedTuple):
    """A solve with one damping, and the share of it that lowers the loss most.

    Attributes:
        loss: the lowest.
        delta: the change of the weights.
        step: which share of the solution it is.
        losses: of all shares that were tried.
        damping: γ of the solve.
        raised: how many times the lowest damping that is.
        iterations: how many the solve took.
        residual: relative, at its end.
    """

    loss: Any
    delta: Any
    step: Any
    losses: Any
    damping: jax.Array
    raised: Any
    iterations: jax.Array
    residual: jax.Array


def best_attempt(attempt: Callable, x: Any, number: int) -> Attempt:
    """The attempt of the lowest loss, of as many as it takes until a full step is the best."""
    best = None
    for k in range(number):
        x, tried = attempt(x, RAISE**k)
        if best is None or tried.loss < best.loss:
            best = tried
        if tried.step == 1.0:
            break
    return best


def best_traced(attempt: Callable, x: Any, number: int) -> Attempt:
    """The same as a `lax.while_loop`."""

    def once(carry):
        k, x, raised, best, _ = carry
        x, tried = attempt(x, raised)
        best = _tree.keep_where((k == 0) | (tried.loss < best.loss), tried, best)
        return k + 1, x, raised * RAISE, best, tried.step == 1.0

    one = jnp.ones((), _tree.wide_dtype(jnp.result_type(*jax.tree.leaves(x))))
    shapes = jax.eval_shape(lambda: attempt(x, one)[1])
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = jnp.zeros((), jnp.int32), x, one, empty, jnp.array(False)
    return jax.lax.while_loop(lambda c: (c[0] < number) & ~c[-1], once, start)[3]
