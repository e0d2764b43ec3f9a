"""Networks without some of their units, and units that can't be cut out of a function."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from fishleg_jax.compaction import comparison, verification
from fishleg_jax.compaction.analysis import Network
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.compaction.slicing import Cuts, cut, cuts_of

FIXED = "f does not run with fewer of these units: their number is fixed elsewhere than in params"


def without(
    network: Network,
    couplings: Sequence[tuple[Member, ...]],
    alive: Sequence[np.ndarray],
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Network, Cuts]:
    """Cuts units out of a network.

    Args:
        network: The network.
        couplings: Tuples of members.
        alive: Booleans over the units of each coupling, which stay.
        changes: Arrays to add to leaves before, by key path.

    Returns:
        The smaller network, and what is cut of each leaf.
    """
    cuts, smaller = cuts_of(couplings, alive), {}
    for name, leaf in network.leaves().items():
        folded = leaf + jnp.asarray(changes[name], leaf.dtype) if name in changes else leaf
        smaller[name] = cut(folded, cuts.get(name, {}))
    return Network(network.function, *network.trees(smaller)), cuts


def uncuttable(
    network: Network,
    couplings: Sequence[tuple[Member, ...]],
    factors: Sequence[Factor],
    inputs: Any,
) -> dict[int, ValueError]:
    """Finds couplings whose units can't be cut, although their order does not matter.

    At weights at which half of the units have none, the smaller network without them has to be the
    same function.  It is not if the outputs depend on the number of units, or their number does
    not come from the shapes of the leaves.  To cut half of them shows that in any precision.

    Args:
        network: The network.
        couplings: Tuples of members.
        factors: Factor of each coupling; those that are known to depend on their number are not
            tried.
        inputs: A few inputs.

    Returns:
        What is wrong, by number of the coupling: `comparison.Different` or `Misfit`.
    """
    leaves, inputs = verification.widened(network, network.leaves(), inputs)
    point = verification.disturbed(leaves, seed=1)
    tried = [
        i
        for i, factor in enumerate(factors)
        if factor.size > 1 and factor.mixed is None and factor.pinned is None
    ]

    def trial(numbers: Sequence[int]) -> ValueError | None:
        alive = [np.ones(members[0].units, bool) for members in couplings]
        empty = dict(point)
        for i in numbers:
            alive[i][alive[i].size // 2 :] = False
            for x in couplings[i]:
                empty[x.name] = x.emptied(empty[x.name], np.flatnonzero(~alive[i]))
        whole = Network(network.function, *network.trees(empty))
        small, _ = without(whole, couplings, alive)
        return comparison.difference(whole, small, inputs)

    if not tried or trial(tried) is None:
        return {}
    found = {i: trial([i]) for i in tried}
    return {i: error for i, error in found.items() if error is not None}
