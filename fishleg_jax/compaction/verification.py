"""Numerical check of couplings: permuting their units must not change the outputs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax.compaction.analysis import Network
from fishleg_jax.compaction.comparison import coarsest, wide
from fishleg_jax.compaction.couplings import Member

SMALL = 0.1  # of the usual size of leaves: smaller ones would have too little effect to be missed
Function = Callable[[dict[str, Any]], Any]  # from leaves by key path to the outputs


def disturbed(leaves: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns leaves at which no two units are alike, so that a missing leaf shows.

    Zeros of masks and of initial biases become numbers, leaves that are much smaller than others
    grow, so that their effect is no rounding, and positive numbers stay positive.
    """
    generator = np.random.default_rng(seed)
    sizes = {name: _size(leaf) for name, leaf in leaves.items()}
    usual = np.median([x for x in sizes.values() if x] or [1.0])
    found = {}
    for name, leaf in leaves.items():
        leaf = np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            found[name] = leaf
            continue
        array = leaf.astype(np.float64)
        size = max(sizes[name], SMALL * usual) if sizes[name] else SMALL
        factor = 1 + 0.3 * generator.uniform(-1, 1, array.shape)
        added = 0.3 * size * generator.uniform(0, 1, array.shape)
        found[name] = (array * factor + added).astype(leaf.dtype)
    return found


def _size(leaf: Any) -> float:
    """Root mean square of a leaf of real numbers, 0 of others."""
    array = np.asarray(leaf)
    if not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        return 0.0
    return float(np.sqrt(np.mean(array.astype(np.float64) ** 2)))


def widened(network: Network, leaves: dict[str, Any], inputs: Any) -> tuple[dict[str, Any], Any]:
    """Leaves and inputs in float32 in place of coarser dtypes, if the network takes that."""

    def wide(x: Any) -> Any:
        dtype = jnp.result_type(x)
        coarse = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return np.asarray(x).astype(np.float32) if coarse else x

    found = jax.tree.map(wide, (leaves, inputs))
    try:
        jax.eval_shape(network.call, *found)
    except Exception:  # whatever a user's function raises
        return leaves, inputs
    return found


def check(function: Function, leaves: dict[str, Any], couplings: Sequence, seed: int = 0) -> None:
    """Raises a ValueError unless permuting the units of each coupling leaves the outputs as is.

    Args:
        function: Function from leaves by key path to the outputs on some inputs.
        leaves: Leaves by key path.
        couplings: Tuples of members.
        seed: Seed of the permutations and of the weights at which they are tried.
    """
    for i, trial in enumerate(_trials(function, leaves, couplings, seed)):
        found = trial.change(trial.members)
        if not found <= trial.limit:
            raise ValueError(
                f"couplings[{i}]: permuting its {trial.members[0].units} units everywhere changes "
                f"the outputs by {found:.2g} of their largest, {_culprit(trial, leaves)}"
            )


def verified(
    function: Function, leaves: dict[str, Any], couplings: Sequence, seed: int = 0
) -> list[tuple[Member, ...]]:
    """Returns the couplings whose units can be permuted; arguments as in `check`."""
    trials = _trials(function, leaves, couplings, seed)
    return [x.members for x in trials if x.change(x.members) <= x.limit]


class Trial(NamedTuple):
    """A coupling and a way to permute its units.

    Attributes:
        members: Its members.
        change: Function from members to the largest relative change of the outputs when the units
            of these are permuted.
        limit: Change that may be rounding.
    """

    members: tuple[Member, ...]
    change: Callable[[Sequence[Member]], float]
    limit: float


def _trials(
    function: Function, leaves: dict[str, Any], couplings: Sequence, seed: int
) -> Iterator[Trial]:
    """Yields a trial of each coupling; a ValueError for outputs that are not finite."""
    if not couplings:
        return
    point = disturbed(leaves, seed)
    run = jax.jit(lambda point: jax.tree.leaves(function(point)))
    before = wide(run(point))
    if not all(np.isfinite(x).all() for x in before):
        raise ValueError(
            "f returns NaN or infinity on the inputs near these params, so couplings can't be "
            "verified"
        )
    generator, limit = np.random.default_rng(seed), coarsest(run, point) ** 0.5
    for members in couplings:
        orders = _generating(generator, members[0].units)

        def change(chosen, orders=orders):
            changed = [wide(run(permuted(point, chosen, order))) for order in orders]
            pairs = [zip(before, after, strict=True) for after in changed]
            return max(_difference(a, b) for outputs in pairs for a, b in outputs)

        yield Trial(members, change, limit)


def _generating(generator: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Two permutations of which all others consist: a cycle of all units, and a swap in it.

    A single one may commute with what `f` does to the units, such as reversing them.
    """
    ring = generator.permutation(units)
    cycle, swap = np.empty(units, int), np.arange(units)
    cycle[ring] = np.roll(ring, 1)
    swap[ring[:2]] = ring[:2][::-1]
    return cycle, swap


def permuted(leaves: dict, members: Sequence[Member], order: np.ndarray) -> dict[str, Any]:
    """Returns leaves with the units of one coupling in another order."""
    found = dict(leaves)
    for member in members:
        found[member.name] = member.take(found[member.name], order)
    return found


def _difference(before: np.ndarray, after: np.ndarray) -> float:
    if before.size == 0:
        return 0.0
    return float(np.abs(before - after).max() / max(np.abs(before).max(), 1e-30))


def _culprit(trial: Trial, leaves: dict) -> str:
    """Says which leaf breaks a coupling, found by leaving each out and by adding each other."""
    members, change, limit = trial
    for member in members:
        rest = [x for x in members if x != member]
        if rest and change(rest) <= limit:
            return f"and without {member.short!r} it does not: leave it out"
    for extra in _others(members, leaves):
        if change([*members, extra]) <= limit:
            return f"and together with {extra.short!r} it does not: add it"
    changes = [
        (change([x for x in members if x != member]), member)
        for member in members
        if len(members) > 1
    ]
    if not changes:
        return f"and no other single leaf makes up for it: {members[0].short!r} is not coupled so"
    least, member = min(changes)
    return (
        f"and by {least:.2g} without {member.short!r}, the leaf that breaks it most; no single "
        "leaf mends it"
    )


def _others(members: Sequence[Member], leaves: dict[str, Any]) -> list[Member]:
    """All axes whose size fits, as further members of a coupling."""
    units = members[0].units
    found = []
    for name, leaf in leaves.items():
        for axis, size in enumerate(jnp.shape(leaf)):
            if size % units == 0:
                found.append(Member(name, axis, size // units, units, 1))
                if size > units:
                    found.append(Member(name, axis, 1, units, size // units))
    return [x for x in found if x not in members]
