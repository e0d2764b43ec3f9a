"""State of the FishLeg estimate, with the operations shared by its parts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _text
from fishleg_jax._devices import sharding
from fishleg_jax.inverse import factors as _factors
from fishleg_jax.inverse._fishleg import guard as _guard
from fishleg_jax.inverse._fishleg import progress as _progress
from fishleg_jax.inverse._kronecker import algebra
from fishleg_jax.inverse._kronecker import frames as _frames
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
        progress: Whether learning still lowers the auxiliary loss; `progress.settled` once it no
            longer does.
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
    progress: _progress.Progress
    auxiliary_loss: jax.Array  # shape=(), float
    relative_residual: jax.Array  # shape=(), float

    def __repr__(self) -> str:
        """Returns a one-line summary without array entries."""
        return _text.one_line(self)


def empty_state(
    units: tuple[Unit, ...],
    damping: float | None,
    dtype: jnp.dtype,
    optimizer: optax.GradientTransformation | None,
) -> FishLegState:
    """Returns the state before any data, for which Q is `I/γ`.

    Args:
        units: Leaves and their factors.
        damping: Damping γ; None if it will be measured, which starts at 1.
        dtype: Data type of the statistics.
        optimizer: Optimiser of the auxiliary loss; None if nothing is learned.
    """
    learned = optimizer is not None
    coordinates = _frames.zero_coordinates if learned else lambda *_: _frames.NOT_LEARNED
    zero, frames, moments = (
        {u.name: u.repeated(empty(u.factor, dtype)) for u in units}
        for empty in (coordinates, _frames.empty_frame, _frames.zero_moments)
    )
    nothing = jnp.full((2,), jnp.nan, dtype)
    return FishLegState(
        count=jnp.zeros((), jnp.int32),
        seen=jnp.zeros((), dtype),
        framed=jnp.array(0, jnp.int32),
        damping=jnp.asarray(1.0 if damping is None else damping, dtype),
        measured=jnp.array(1.0, dtype),
        moments=moments,
        frames=frames,
        coordinates=zero,
        average=jax.tree.map(jnp.copy, zero),
        optimizer=optimizer.init(zero) if learned else (),
        guard=_guard.init(dtype),
        progress=_progress.init(dtype),
        # two separate arrays: a state with aliased leaves cannot be donated
        auxiliary_loss=nothing[0],
        relative_residual=nothing[1],
    )


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
