"""A branch that changes a part of a large state, without copies of the rest of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def run_if(condition: jax.Array, function: Callable, carry: Any) -> Any:
    """`function(carry)` where a boolean scalar is true, else the carry as it came.

    One round of a loop or none: what a loop carries stays in its place where it may (a state that
    was donated), while XLA copies all that passes through a `lax.cond`, on either branch.

    Args:
        condition: a boolean scalar.
        function: from a carry to one of the same structure, shapes and dtypes.
        carry: a pytree of arrays.
    """
    _, carry = jax.lax.while_loop(
        lambda loop: loop[0],
        lambda loop: (jnp.zeros_like(loop[0]), function(loop[1])),
        (condition, carry),
    )
    return carry
