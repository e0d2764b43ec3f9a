"""Estimators of the damped inverse Fisher, all with the protocol of `InverseFisher`."""

from fishleg_jax.inverse import factors
from fishleg_jax.inverse._diagonal import DiagonalState, diagonal
from fishleg_jax.inverse._fishleg.estimate import fishleg
from fishleg_jax.inverse._fishleg.state import FishLegState
from fishleg_jax.inverse._identity import identity
from fishleg_jax.inverse._kfac import KfacState, kfac
from fishleg_jax.inverse._mfac import MfacState, mfac
from fishleg_jax.inverse._woodfisher import WoodFisherState, woodfisher
from fishleg_jax.inverse.base import InverseFisher, with_damping

__all__ = [
    "DiagonalState",
    "FishLegState",
    "InverseFisher",
    "KfacState",
    "MfacState",
    "WoodFisherState",
    "diagonal",
    "factors",
    "fishleg",
    "identity",
    "kfac",
    "mfac",
    "with_damping",
    "woodfisher",
]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
