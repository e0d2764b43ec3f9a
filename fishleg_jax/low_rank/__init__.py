"""Low-rank networks: kernels as products of smaller ones, in the metric of the Fisher."""

from fishleg_jax.low_rank.decomposition import Decomposition, decompose
from fishleg_jax.low_rank.report import DecompositionReport, Row
from fishleg_jax.low_rank.running import apply

__all__ = ["Decomposition", "DecompositionReport", "Row", "apply", "decompose"]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
