"""A branch that updates part of a large state without copying the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def run_if(condition: jax.Array, function: Callable, carry: Any) -> Any:
    """Returns `function(carry)` if a boolean scalar is true, else the carry unchanged.

    Implemented as a loop of one or zero iterations: a loop updates its carry in place if possible
    (for a donated state), while XLA copies everything that passes through a `lax.cond`, on either
    branch.

    Args:
        condition: Boolean scalar.
        function: Function from a carry to one of the same structure, shapes and dtypes.
        carry: Pytree of arrays.
    """
    _, carry = jax.lax.while_loop(
        lambda loop: loop[0],
        lambda loop: (jnp.zeros_like(loop[0]), function(loop[1])),
        (condition, carry),
    )
    return carry
