"""The state of the FishLeg estimate, and the few things that all of its parts do with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text
from fishleg_jax._devices import sharding
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._fishleg import guard as _guard
from fishleg_jax.inverse._kronecker import algebra
from fishleg_jax.inverse._kronecker.units import Unit


class Seen(NamedTuple):
    """Numbers of examples, by which all running means are weighted.

    Attributes:
        examples: number of examples of all batches that were assimilated.
        half: number of those in the current half of the start.
        pairs: sum over pairs of different Fisher samples of the products of their numbers of
            examples, by which the measured damping is weighted.
    """

    examples: jax.Array  # shape=(), float
    half: jax.Array  # shape=(), float
    pairs: jax.Array  # shape=(), float


class FishLegState(NamedTuple):
    """State of `fishleg`.  Dictionaries are by unit: the key path of a leaf.

    Attributes:
        count: number of batches assimilated, which decides the phase.
        seen: numbers of examples in them, which decide the weights of running means.
        damping: γ; it may be changed at any time after the start.
        squares: mean squares of Fisher samples, the diagonal of the Fisher, of the leaves that the
            damping is measured on; empty where the damping is given.
        moments: second moments, of which frames are made.
        frames: what was set from data.
        coordinates: λ, the current iterate.
        average: λ, its running average, which `multiply` and `diagonal` use.
        optimizer: the state of the auxiliary optimiser.
        guard: the state of the guard against divergence.
        auxiliary_loss: A(λ), smoothed; it falls towards −½ tr F_γ⁻¹.  NaN before it is learned.
        relative_residual: `‖F_γQu − u‖ / ‖u‖`, smoothed; 0 for the exact inverse.  A Q of limited
            structure has its lowest loss at a residual that need not be below one.
    """

    count: jax.Array  # shape=(), int32
    seen: Seen
    damping: jax.Array  # shape=(), float
    squares: dict[str, jax.Array]
    moments: dict[str, tuple[jax.Array, ...]]
    frames: dict[str, _factors.Frame]
    coordinates: dict[str, _factors.Coordinates]
    average: dict[str, _factors.Coordinates]
    optimizer: Any
    guard: _guard.Guard
    auxiliary_loss: jax.Array  # shape=(), float
    relative_residual: jax.Array  # shape=(), float

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


def multiply_leaves(
    units: tuple[Unit, ...],
    state: FishLegState,
    coordinates: dict[str, _factors.Coordinates],
    leaves: list[jax.Array],
) -> list[jax.Array]:
    """Q at some coordinates, times the leaves of a flattened tree."""

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
    """A running mean: `old + weight (new − old)`; a weight of zero keeps NaNs in `new` out."""
    return jax.tree.map(lambda o, n: o + weight * jnp.where(weight > 0, n - o, 0), old, new)
