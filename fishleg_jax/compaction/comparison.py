"""Comparison of a network with a smaller one that is to be the same function."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._jaxpr import functions, opened
from fishleg_jax.compaction.analysis import Network
from fishleg_jax.compaction.tape import called

TOLERANCE = 1e-5  # between outputs in float32 or finer, relative to the largest
ROUNDINGS = 4  # the same in coarser dtypes, in machine epsilons
WIDTH = "the outputs depend on the number of these units"


class Different(ValueError):
    """The smaller network computes something else."""


class Misfit(ValueError):
    """The function does not run with the smaller arrays."""


def compare(network: Network, small: Network, inputs: Any, tolerance: float | None) -> float:
    """Returns the relative difference of the outputs of two networks.

    Args:
        network: The network before.
        small: The smaller one.
        inputs: Inputs of both.
        tolerance: Largest difference; None for the precision's own.

    Raises:
        Different: A larger difference.
        Misfit: A function that does not run with the smaller arrays, or gives outputs of other
            shapes.
    """
    if tolerance is None:
        tolerance = default_tolerance(lambda leaves: network.call(leaves, inputs), network.leaves())
    worst = _largest_difference(*_outputs(network, small, inputs))
    if not worst <= tolerance:
        raise Different(
            f"the outputs of the smaller network differ by {worst:.2g} of their largest, more than "
            f"the tolerance {tolerance:g}: f depends on the number of units (as attention's scale "
            "does on the size of a head), or takes it from elsewhere than the shapes of params; "
            "leave that coupling out of couplings=; if it is rounding, pass a larger tolerance="
        )
    return worst


def difference(network: Network, small: Network, inputs: Any) -> ValueError | None:
    """What is wrong with a smaller network far beyond rounding; None if nothing is.

    Args:
        network: The network before.
        small: The smaller one.
        inputs: Inputs of both.
    """
    limit = coarsest(lambda leaves: network.call(leaves, inputs), network.leaves()) ** 0.5
    try:
        before, after = _outputs(network, small, inputs)
    except Misfit as error:
        return error
    if not all(np.isfinite(x).all() for x in before):
        return None  # such weights are none for this network
    worst = _largest_difference(before, after)
    return None if worst <= limit else Different(WIDTH)


def _outputs(
    network: Network, small: Network, inputs: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of both networks in double precision."""
    before = jax.tree.leaves(jax.jit(network.call)(network.leaves(), inputs))
    try:
        after = jax.tree.leaves(jax.jit(small.call)(small.leaves(), inputs))
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise Misfit(
            "f does not run with the smaller arrays, so its sizes do not all come from the shapes "
            f"of params; derive them from there, or leave the coupling out: {text}"
        ) from error
    if [x.shape for x in before] != [x.shape for x in after]:
        raise Misfit(
            "f returns other shapes with the smaller arrays, "
            f"{[x.shape for x in after]} instead of {[x.shape for x in before]}: its sizes do not "
            "all come from the shapes of params"
        )
    return wide(before), wide(after)


def _largest_difference(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """Largest difference of two lists of outputs, each relative to its largest entry."""
    pairs = zip(before, after, strict=True)
    return max(
        (
            float(np.abs(x - y).max(initial=0.0) / (np.abs(x).max(initial=0.0) or 1.0))
            for x, y in pairs
        ),
        default=0.0,
    )


def wide(outputs: Sequence[Any]) -> list[np.ndarray]:
    """Outputs in double precision, complex ones with their imaginary parts."""
    arrays = map(np.asarray, outputs)
    return [x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in arrays]


def coarsest(run: Callable, leaves: Any) -> float:
    """Machine epsilon of the coarsest floating dtype among leaves and all computed from them."""
    given = jax.tree.leaves(leaves)
    jaxpr = jax.make_jaxpr(run)(leaves).jaxpr
    dtypes = {jnp.result_type(x) for x in given} | set(_dtypes(jaxpr, [True] * len(given)))
    return max(float(jnp.finfo(x).eps) for x in dtypes if jnp.issubdtype(x, jnp.floating))


def default_tolerance(run: Callable, leaves: Any) -> float:
    """Relative difference of outputs that may be rounding of sums in another order."""
    epsilon = coarsest(run, leaves)
    return ROUNDINGS * epsilon if epsilon > jnp.finfo(jnp.float32).eps else TOLERANCE


def _dtypes(jaxpr: Any, marked: Sequence[bool]) -> Iterator[Any]:
    """Dtypes of everything that a traced function computes from its marked arguments."""
    known = {id(x) for x, mark in zip(jaxpr.invars, marked, strict=True) if mark}
    for equation in jaxpr.eqns:
        marks = [id(x) in known for x in equation.invars]
        if not any(marks):
            continue
        known |= {id(x) for x in equation.outvars}
        yield from (x.aval.dtype for x in equation.outvars if hasattr(x.aval, "dtype"))
        same = called(equation) is not None
        for inner in map(opened, functions(equation)):
            # in loops and branches a value that is not marked at first may become so
            yield from _dtypes(inner, marks if same else [True] * len(inner.invars))
