"""Storage of weights in noisy analog cells, with cells allotted by curvature.

A weight is kept as the conductance of one or several memory cells, and comes back with noise: a
cell is a Gaussian channel.  Several cells for a weight are averaged; the Fisher says which weights
are worth it.
"""

from fishleg_jax.storage.allotment import allot, equal, expected_rise
from fishleg_jax.storage.cells import Cell, gaussian, pcm
from fishleg_jax.storage.coding import Coding, Stored, read, variances, write
from fishleg_jax.storage.cost import Cost, cost, digital_cost
from fishleg_jax.storage.curvature import fisher_under_noise
from fishleg_jax.storage.digital import Digital, digital, quantise

__all__ = [
    "Cell",
    "Coding",
    "Cost",
    "Digital",
    "Stored",
    "allot",
    "cost",
    "digital",
    "digital_cost",
    "equal",
    "expected_rise",
    "fisher_under_noise",
    "gaussian",
    "pcm",
    "quantise",
    "read",
    "variances",
    "write",
]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
