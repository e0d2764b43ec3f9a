"""Orthonormal bases of weights: a network is pruned in its coefficients, such as those of a DCT."""

from fishleg_jax.bases.bands import by_band
from fishleg_jax.bases.basis import Basis, in_basis
from fishleg_jax.bases.kinds import dct, identity, orthonormal

__all__ = ["Basis", "by_band", "dct", "identity", "in_basis", "orthonormal"]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
