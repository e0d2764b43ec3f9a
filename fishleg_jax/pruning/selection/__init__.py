"""Selections: choose pruned weights as a set, where the OBS mask ranks every weight by itself.

A selection is a function `(params, old_masks, new_masks, scores, curvature, estimator, state,
scope) -> masks` that prunes as many weights as `new_masks` (with the scope `layer` in every leaf)
and all that `old_masks` prunes, but never those that may not be pruned (their scores are infinite).
One that takes a keyword `first_order` is given True if scores take the gradient into account.
"""

from fishleg_jax.pruning.selection._annealing import anneal
from fishleg_jax.pruning.selection._border import Selection
from fishleg_jax.pruning.selection._objectives import compensated_cost, qubo_cost
from fishleg_jax.pruning.selection._quantise import Quantised, quantise
from fishleg_jax.pruning.selection._qubo import qubo
from fishleg_jax.pruning.selection._swap_search import Found, swap_search
from fishleg_jax.pruning.selection._swaps import swaps

__all__ = [
    "Found",
    "Quantised",
    "Selection",
    "anneal",
    "compensated_cost",
    "quantise",
    "qubo",
    "qubo_cost",
    "swap_search",
    "swaps",
]


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
