"""Estimates of the damped inverse Fisher, all behind the protocol of `InverseFisher`."""

from fishleg_jax.inverse import factors
from fishleg_jax.inverse._fishleg import fishleg
from fishleg_jax.inverse._state import FishLegState
from fishleg_jax.inverse.base import InverseFisher, identity

__all__ = ["FishLegState", "InverseFisher", "factors", "fishleg", "identity"]
