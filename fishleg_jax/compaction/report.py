"""Numbers of a compaction: units, weights, bytes and operations before and after."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import likelihoods
from fishleg_jax.compaction.analysis import Network, first
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.model import Model
from fishleg_jax.pruning._tables import text_table
from fishleg_jax.pruning.costs import weight_costs

USED = "what it gives out is neither constant nor unused"


class Units(NamedTuple):
    """Numbers of one coupling.

    Attributes:
        name: Key path and axis of its first member.
        before: Number of units before.
        after: Number of units after.
        stay: Numbers of units that stay although a kernel, or all, lost their weights, by reason.
    """

    name: str
    before: int
    after: int
    stay: dict[str, tuple[int, ...]]


class CompactReport(NamedTuple):
    """Sizes of a network before and after compaction; print it.

    Attributes:
        units: Numbers of every coupling.
        weights: Numbers of weights, before and after.
        bytes: Bytes of parameters and constants, before and after.
        flops: Operations per example in which weights take part, before and after; None where
            they can't be counted.
        folded: Key paths of the leaves that took up the constants of removed units.
        difference: Largest difference between the outputs on the inputs given, relative to the
            largest output.
    """

    units: tuple[Units, ...]
    weights: tuple[int, int]
    bytes: tuple[int, int]
    flops: tuple[float, float] | None
    folded: tuple[str, ...]
    difference: float

    def __repr__(self) -> str:
        """One line."""
        return f"CompactReport({self.summary()})"

    def __str__(self) -> str:
        """Table of the couplings, the reasons of units that stay, and the sums."""
        rows = [(x.name, f"{x.before:,}", f"{x.after:,}") for x in self.units]
        parts = ["\n".join(text_table(("units of", "before", "after"), rows, texts=1))]
        parts += [
            f"{x.name}: {_numbers(units)} {'stay' if len(units) > 1 else 'stays'}: {reason}"
            for x in self.units
            for reason, units in x.stay.items()
        ]
        if self.folded:
            parts.append(f"Constants of removed units were added to {', '.join(self.folded)}")
        return "\n".join([*parts, self.summary()])

    def summary(self) -> str:
        """Weights, bytes and operations before and after, in one line.

        Returns:
            A text such as `120 of 240 weights, 480 of 960 bytes, 2,000 of 4,000 operations`.

        Example:
            >>> CompactReport((), (240, 120), (960, 480), None, (), 0.0).summary()
            '120 of 240 weights, 480 of 960 bytes'
        """
        parts = [f"{self.weights[1]:,} of {self.weights[0]:,} weights"]
        parts.append(f"{self.bytes[1]:,} of {self.bytes[0]:,} bytes")
        if self.flops is not None:
            parts.append(f"{self.flops[1]:,.0f} of {self.flops[0]:,.0f} operations")
        return ", ".join(parts)


def _numbers(units: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, units[:most]))
    more = f" and {len(units) - most} more" if len(units) > most else ""
    return f"unit{'s' if len(units) > 1 else ''} {shown}{more}"


def units_of(
    members: Sequence[Member], living: np.ndarray, reasons: Mapping[int, str], leaves: Mapping
) -> Units:
    """Returns the numbers of one coupling.

    Args:
        members: Its members.
        living: Booleans, which units stay.
        reasons: Reason why a unit without weights stays, by unit.
        leaves: Leaves by key path, pruned weights at zero.
    """
    found = dict(reasons)
    for member in members:
        if np.ndim(leaves[member.name]) < 2:
            continue
        weights = member.by_unit(leaves[member.name]).any(axis=(0, 2, 3))
        for unit in np.flatnonzero(living & ~weights).tolist():
            found.setdefault(unit, f"all its weights in {member.name} are zero, but {USED}")
    stay: dict[str, tuple[int, ...]] = {}
    for unit, reason in found.items():
        stay[reason] = (*stay.get(reason, ()), unit)
    name = f"{members[0].name} axis {members[0].axis}"
    return Units(name, living.size, int(living.sum()), stay)


def flops(network: Network, inputs: Any) -> float | None:
    """Operations per example in which weights take part; None if they can't be counted."""
    model = Model(network.function, likelihoods.gaussian())
    constants = () if network.constants is None else (network.constants,)
    try:
        costs = weight_costs(model, network.params, (first(inputs, 1), None, *constants))
    except (ValueError, TypeError):
        return None
    pairs = zip(jax.tree.leaves(costs), jax.tree.leaves(network.params), strict=True)
    return sum(cost * np.size(leaf) for cost, leaf in pairs)


def size(tree: Any) -> int:
    """Number of entries of a tree's arrays."""
    return sum(jnp.size(x) for x in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays."""
    return sum(jnp.size(x) * jnp.asarray(x).dtype.itemsize for x in jax.tree.leaves(tree))
