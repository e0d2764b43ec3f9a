"""Simulated annealing of the quadratic form, by a maintained library: dwave-samplers."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fishleg_jax._checks.numbers import check_count
from fishleg_jax._jit import is_traced
from fishleg_jax.pruning.selection._objectives import as_floats, qubo_cost
from fishleg_jax.pruning.selection._swap_search import Found

# penalties on the number of pruned weights, relative to the cost of one weight: a hard one freezes
# the annealing, as every swap passes through another number, and a soft one leaves much to repair
PENALTIES = (0.1, 0.3, 0.03, 0.01)


def require_sampler() -> Any:
    """Imports dimod and dwave.samplers, or raises an ImportError that says how to install them."""
    try:
        import dimod
        from dwave import samplers
    except ImportError as error:
        raise ImportError(
            "simulated annealing needs dwave-samplers: pip install 'fishleg_jax[selection]'"
        ) from error
    return dimod, samplers


def refuse_traced(arrays: Any, name: str, instead: str) -> None:
    """Raises a ValueError if any array is traced, as the sampler runs on the host.

    Args:
        arrays: Arrays, or a pytree of them.
        name: What the caller asked for, for the error.
        instead: What can be traced in its place, for the error.
    """
    if is_traced(arrays):
        raise ValueError(
            f"{name} runs on the host and got traced arrays: call it outside of jax.jit, jax.vmap "
            f"and jax.grad, or use {instead}"
        )


def anneal(
    linear: Any,
    quadratic: Any,
    pruned: Any,
    *,
    groups: Any | None = None,
    reads: int = 32,
    sweeps: int = 1000,
    seed: int = 0,
) -> Found:
    """Lowers `qubo_cost` at a given number of pruned weights, by simulated annealing.

    The number is held by a penalty on the squared difference from it, of several strengths, among
    which the reads are shared out.  A read that ends with another number is repaired, one weight at
    a time, each the one that costs least.

    Args:
        linear: c of `qubo_cost`, shape (n,).
        quadratic: H, shape (n, n).
        pruned: Set to compare with, which also gives the number of weights to prune; booleans of
            shape (n,).
        groups: Whole numbers of shape (n,); the number is kept in every group.  None for a single
            group.
        reads: Number of starts of the annealing, 32 by default.
        sweeps: Number of passes over the weights in each read, 1000 by default.
        seed: Seed of the random numbers, 0 by default.

    Returns:
        The best of all reads and the start; `swaps` counts the weights that changed places.

    Raises:
        ValueError: Mismatched shapes, an empty array, fewer than one read or sweep, or traced
            arrays: the sampler runs on the host.
        ImportError: dwave-samplers is not installed.

    References:
        Kirkpatrick, Gelatt & Vecchi, Optimization by simulated annealing, Science, 1983;
        Yu et al., The combinatorial brain surgeon, ICML 2022.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> fisher = jnp.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.3]])
        >>> start = jnp.array([True, True, False])
        >>> found = flj.selection.anneal(jnp.zeros(3), fisher, start)
        >>> round(float(found.before), 2), round(float(found.after), 2)
        (3.0, 2.15)
    """
    reads, sweeps = check_count(reads, "reads"), check_count(sweeps, "sweeps")
    seed = check_count(seed, "seed", least=0)
    linear, quadratic, pruned = as_floats(linear), as_floats(quadratic), jnp.asarray(pruned)
    before = qubo_cost(linear, quadratic, pruned)
    refuse_traced((quadratic, before, groups), "anneal", "swap_search")
    if groups is not None and np.shape(groups) != pruned.shape:
        raise ValueError(f"groups must have shape {pruned.shape}, got {np.shape(groups)}")
    # Start and number of pruned weights in every group.
    require_sampler()
    start = np.asarray(pruned)
    if not np.isfinite(before) or not np.isfinite(quadratic).all():
        return Found(pruned, before, before, jnp.zeros((), jnp.int32))
    members = _members(np.zeros(len(start), int) if groups is None else np.asarray(groups))
    counts = members @ start
    c, h = np.asarray(linear, float), np.asarray(quadratic, float)

    # Share the reads out among the penalties, repair their ends and take the best.
    found = np.concatenate(
        [
            sample(c, h, members, counts, start, share, part, sweeps, seed)
            for share, part in zip(PENALTIES, parts(reads, len(PENALTIES)), strict=True)
            if part
        ]
    )
    repaired = [_repaired(x, c, h, members, counts) for x in found]
    costs = [c @ x + x @ h @ x / 2 for x in repaired]
    best = jnp.asarray(repaired[int(np.argmin(costs))])
    # Keep the start unless the best is lower.
    after = qubo_cost(linear, quadratic, best)
    if not after < before:
        return Found(pruned, before, before, jnp.zeros((), jnp.int32))
    return Found(best, before, after, jnp.sum(pruned & ~best).astype(jnp.int32))


def parts(total: int, number: int) -> list[int]:
    """A number split into parts as equal as can be, the larger ones last."""
    return [(total + i) // number for i in reversed(range(number))]


def sample(
    c: np.ndarray,
    h: np.ndarray,
    members: np.ndarray,
    counts: np.ndarray,
    start: np.ndarray,
    share: float,
    reads: int,
    sweeps: int,
    seed: int,
) -> np.ndarray:
    """Sets in which the sampler ends, with numbers of ones near the requested ones.

    Args:
        c: Linear coefficients, shape (n,).
        h: Quadratic ones, shape (n, n), symmetric.
        members: Zeros and ones, a row for each group of variables whose sum is held.
        counts: Sum in each group.
        start: Binary variables, at which the largest change by one of them is the unit of `share`.
        share: Strength of the penalty on the squared difference from the counts.
        reads: Number of samples.
        sweeps: Number of passes over the variables in each of them.
        seed: Seed of the random numbers.

    Returns:
        Booleans of shape (reads, n).
    """
    dimod, samplers = require_sampler()
    # in units of the largest change of the cost by one weight at the start
    changes = c + h @ start + np.where(start, -0.5, 0.5) * np.diagonal(h)
    unit = max(float(np.abs(changes).max()), np.finfo(float).tiny)
    # (Σx − k)² = Σ_i (1 − 2k) x_i + Σ_{i≠j} x_i x_j + k², as x² = x
    biases = (c + np.diagonal(h) / 2) / unit + share * (members.sum(axis=0) - 2 * counts @ members)
    couplings = np.triu(h / unit + 2 * share * members.T @ members, 1)
    model = dimod.BinaryQuadraticModel(biases, couplings, "BINARY")
    samples = samplers.SimulatedAnnealingSampler().sample(
        model, num_reads=reads, num_sweeps=sweeps, seed=seed % 2**32
    )
    order = np.argsort(np.asarray(samples.variables))
    return samples.record.sample.astype(bool)[:, order]


def _members(groups: np.ndarray) -> np.ndarray:
    """Indicator matrix of the groups: a row of zeros and ones for each."""
    return (np.unique(groups)[:, None] == groups[None]).astype(int)


def _repaired(
    x: np.ndarray, c: np.ndarray, h: np.ndarray, members: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Restores the required number of weights in every group, by the cheapest single changes."""
    x = x.copy()
    for inside, count in zip(members.astype(bool), counts, strict=True):
        while (surplus := int(x[inside].sum() - count)) != 0:
            changes = np.where(x, -1, 1) * (c + h @ x) + np.diagonal(h) / 2
            movable = inside & (x == (surplus > 0))
            i = int(np.argmin(np.where(movable, changes, np.inf)))
            x[i] = not x[i]
    return x
