"""What units of a network cost: weights, bytes, operations, or time."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fishleg_jax.compaction import report as _report
from fishleg_jax.compaction.analysis import Network
from fishleg_jax.compaction.slicing import cut, cuts_of
from fishleg_jax.compaction.timing import Clock

TIMES = ("seconds", "time_share")

Cost = Callable[[Sequence[np.ndarray], str], float]  # of the units that stay, in some unit


def measure(network: Network, couplings: Sequence, inputs: Any, clock: Clock | None) -> Cost:
    """Function from the units that stay and the unit of a cost to the smaller network's cost.

    All but time come from shapes alone.  Costs are remembered, so that a time is measured once.

    Args:
        network: The whole network.
        couplings: Axes that index the same units.
        inputs: Inputs with a leading axis of examples.
        clock: For times; None if none is asked for.

    Returns:
        The function.
    """
    known: dict[tuple, float] = {}

    def of(alive: Sequence[np.ndarray], unit: str) -> float:
        key = (unit, *(x.tobytes() for x in alive))
        if key not in known:
            known[key] = _cost(network, couplings, alive, inputs, unit, clock)
        return known[key]

    return of


def prices(cost: Cost, whole: Sequence[np.ndarray], unit: str) -> list[float]:
    """Cost of a unit of every coupling at full size, as a share of the whole network's.

    A single unit's time is below the noise of a clock, and vectors of its width may take no less
    without it, so that half of the units are timed.  What seems to cost next to nothing costs half
    of the time that its operations would take at the network's mean speed.
    """
    counted = "flops" if unit in TIMES else unit
    total = cost(whole, counted)
    found = _saved(cost, whole, counted, total, lambda units: units - 1)
    found = [max(price, 1e-30) / max(total, 1.0) for price in found]
    if unit not in TIMES:
        return found
    times = _saved(cost, whole, "time_share", 1.0, lambda units: units // 2)
    return [max(own, 0.5 * price) for own, price in zip(times, found, strict=True)]


def _saved(
    cost: Cost, whole: Sequence[np.ndarray], unit: str, total: float, left: Callable[[int], int]
) -> list[float]:
    """What each unit of a coupling saves when only some of its units are left."""
    found = []
    for i, own in enumerate(whole):
        stay = max(left(own.size), 1)
        fewer = [*whole[:i], np.arange(own.size) < stay, *whole[i + 1 :]]
        found.append((total - cost(fewer, unit)) / max(own.size - stay, 1))
    return found


def _cost(
    network: Network,
    couplings: Sequence,
    alive: Sequence[np.ndarray],
    inputs: Any,
    unit: str,
    clock: Clock | None,
) -> float:
    """Cost of a network with some of its units; all but time from shapes alone."""
    cuts = cuts_of(couplings, alive)
    leaves = {name: cut(leaf, cuts.get(name, {})) for name, leaf in network.leaves().items()}
    small = Network(network.function, *network.trees(leaves))
    if clock is not None and unit in TIMES:
        return clock.share(small) * (clock.whole if unit == "seconds" else 1.0)
    if unit == "flops":
        found = _report.flops(small, inputs)
        if found is None:
            raise ValueError("goal: the operations of f can't be counted; use another target")
        return found
    size = _report.size if unit == "weights" else _report.bytes_of
    return float(size(small.params))
