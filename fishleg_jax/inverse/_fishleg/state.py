"""State of the FishLeg estimate, with the operations shared by its parts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._devices import sharding
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._fishleg import guard as _guard
from fishleg_jax.inverse._kronecker import algebra
from fishleg_jax.inverse._kronecker.units import Unit


class FishLegState(NamedTuple):
    """State of `fishleg`.  Dictionaries are keyed by unit: the key path of a leaf.

    Attributes:
        count: Number of batches assimilated, which determines the phase.
        seen: Number of examples in these batches, which weights running means.
        framed: Number of batches behind the current frames.
        damping: Damping γ; may be changed at any time.  If it is measured, a change stays as a
            factor.
        measured: Damping as measured; 1 before, and if it is given.
        moments: Second moments that determine the frames.
        frames: Eigenvectors and eigenvalues set from data.
        coordinates: Current iterate of λ; empty where nothing is learned.
        average: Running average of λ, used by `multiply` and `diagonal`.
        optimizer: State of the auxiliary optimiser.
        guard: State of the guard against divergence.
        auxiliary_loss: Smoothed A(λ), which falls towards −½ tr F_γ⁻¹.  NaN before learning.
        relative_residual: Smoothed `‖F_γQu − u‖ / ‖u‖`; 0 for the exact inverse.  A Q of limited
            structure may have its lowest loss at a residual above 1.
    """

    count: jax.Array  # shape=(), int32
    seen: jax.Array  # shape=(), float
    framed: jax.Array  # shape=(), int32
    damping: jax.Array  # shape=(), float
    measured: jax.Array  # shape=(), float
    moments: dict[str, tuple[jax.Array, ...]]
    frames: dict[str, _factors.Frame]
    coordinates: dict[str, _factors.Coordinates]
    average: dict[str, _factors.Coordinates]
    optimizer: Any
    guard: _guard.Guard
    auxiliary_loss: jax.Array  # shape=(), float
    relative_residual: jax.Array  # shape=(), float

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def multiply_leaves(
    units: tuple[Unit, ...],
    state: FishLegState,
    coordinates: dict[str, _factors.Coordinates],
    leaves: list[jax.Array],
) -> list[jax.Array]:
    """Product of Q at the given coordinates with the leaves of a flattened tree."""

    def product(frames, damping, coordinates, leaves):
        out = list(leaves)
        for unit in units:
            args = frames[unit.name], coordinates[unit.name], unit.pack(leaves)
            of_layer = lambda f, c, v, factor=unit.factor: algebra.multiply(  # noqa: E731
                factor, f, c, damping, v
            )
            unit.unpack(unit.each(of_layer, *args), out)
        return out

    return sharding.automatic(product, leaves, state.frames, state.damping, coordinates, leaves)


def move(old: Any, new: Any, weight: jax.Array) -> Any:
    """Running mean `old + weight (new − old)`; a weight of zero ignores NaNs in `new`."""
    return jax.tree.map(lambda o, n: o + weight * jnp.where(weight > 0, n - o, 0), old, new)
