"""Numerical check of couplings: permuting their units must not change the outputs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._jaxpr import functions, opened
from fishleg_jax.compaction.couplings import Member

Function = Callable[[dict[str, Any]], Any]  # from leaves by key path to the outputs


def disturbed(leaves: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns leaves at which no two units are alike, so that a missing leaf shows.

    Zeros of masks and of initial biases become numbers, and positive numbers stay positive.
    """
    generator = np.random.default_rng(seed)
    found = {}
    for name, leaf in leaves.items():
        leaf = np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            found[name] = leaf
            continue
        array = leaf.astype(np.float64)
        size = np.sqrt(np.mean(array**2)) if array.size else 0.0
        factor = 1 + 0.3 * generator.uniform(-1, 1, array.shape)
        added = 0.3 * (size or 0.1) * generator.uniform(0, 1, array.shape)
        found[name] = (array * factor + added).astype(leaf.dtype)
    return found


def check(function: Function, leaves: dict[str, Any], couplings: Sequence, seed: int = 0) -> None:
    """Raises a ValueError unless permuting the units of each coupling leaves the outputs as is.

    Args:
        function: Function from leaves by key path to the outputs on some inputs.
        leaves: Leaves by key path.
        couplings: Tuples of members.
        seed: Seed of the permutations and of the weights at which they are tried.
    """
    if not couplings:
        return
    point = disturbed(leaves, seed)
    run = jax.jit(lambda point: jax.tree.leaves(function(point)))
    before = _wide(run(point))
    if not all(np.isfinite(x).all() for x in before):
        raise ValueError(
            "f returns NaN or infinity on the inputs near these params, so couplings can't be "
            "verified"
        )
    generator, limit = np.random.default_rng(seed), _rounding(run, point)
    for i, members in enumerate(couplings):
        units = members[0].units
        if units < 2:
            continue
        order = generator.permutation(units)
        order = np.roll(order, 1) if (order == np.arange(units)).all() else order

        def change(chosen, order=order):
            after = _wide(run(permuted(point, chosen, order)))
            return max(_difference(a, b) for a, b in zip(before, after, strict=True))

        found = change(members)
        if not found <= limit:
            raise ValueError(
                f"couplings[{i}]: permuting its {units} units everywhere changes the outputs by "
                f"{found:.2g} of their largest, {_culprit(members, leaves, change, limit)}"
            )


def permuted(leaves: dict, members: Sequence[Member], order: np.ndarray) -> dict[str, Any]:
    """Returns leaves with the units of one coupling in another order."""
    found = dict(leaves)
    for member in members:
        found[member.name] = member.take(found[member.name], order)
    return found


def _wide(outputs: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.float64) for x in outputs]


def _difference(before: np.ndarray, after: np.ndarray) -> float:
    if before.size == 0:
        return 0.0
    return float(np.abs(before - after).max() / max(np.abs(before).max(), 1e-30))


def _rounding(run: Callable, point: dict) -> float:
    """Relative change of the outputs that may be rounding: the root of the coarsest precision."""
    dtypes = {x.dtype for x in point.values()} | set(_dtypes(jax.make_jaxpr(run)(point)))
    return max(float(jnp.finfo(x).eps) for x in dtypes if jnp.issubdtype(x, jnp.floating)) ** 0.5


def _dtypes(function: Any) -> Iterator[Any]:
    """Dtypes of everything that a traced function computes."""
    for equation in opened(function).eqns:
        yield from (x.aval.dtype for x in equation.outvars if hasattr(x.aval, "dtype"))
        for inner in functions(equation):
            yield from _dtypes(inner)


def _culprit(members: Sequence, leaves: dict, change: Callable, limit: float) -> str:
    """Says which leaf breaks a coupling, found by leaving each out and by adding each other."""
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
