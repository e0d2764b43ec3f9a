"""Pruning and quantisation of a block of weights as one QUBO."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text
from fishleg_jax._checks.numbers import check_count, check_positive
from fishleg_jax._jit import jitted
from fishleg_jax.pruning.selection import _levels
from fishleg_jax.pruning.selection._annealing import PENALTIES, parts, refuse_traced, sample
from fishleg_jax.pruning.selection._levels import Problem
from fishleg_jax.pruning.selection._objectives import as_floats

SOLVERS = ("moves", "annealed moves", "annealing")
SCALES = np.linspace(0.2, 1.2, 21)  # of the largest weight over the highest level, that are tried


class Quantised(NamedTuple):
    """Weights on levels and their costs, as `quantise` returns them.

    Attributes:
        weights: `sign(w) · scale · level`.
        levels: 0 for pruned, else 1 to `2**bits`.
        scale: Value of level 1.
        before: Cost of the start: the weights with the lowest scores pruned, the others rounded.
        after: Cost of the result, never above `before`.
    """

    weights: jax.Array  # shape=(n,), float
    levels: jax.Array  # shape=(n,), int32
    scale: jax.Array  # shape=(), float
    before: jax.Array  # shape=(), float
    after: jax.Array  # shape=(), float

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


def quantise(
    weights: jax.Array,
    fisher: jax.Array,
    *,
    keep: int,
    bits: int,
    scale: float | None = None,
    solver: str = "moves",
    steps: int = 10_000,
    reads: int = 8,
    sweeps: int = 200,
    seed: int = 0,
) -> Quantised:
    """Prunes weights and puts the others on few levels, where the quadratic loss is lowest.

    The result v has `keep` weights `± scale · {1, …, 2**bits}` with the signs of w, and zeros, and
    lowers `½ (v − w)ᵀF(v − w)`: kept weights make up for pruned and rounded ones as far as their
    levels allow.  In binary variables, a mask bit `m_i` and bits `b_ik ≤ m_i` with
    `v_i = ± scale (m_i + Σ_k 2ᵏ b_ik)`, it is a QUBO of a given number of ones among the masks.

    Args:
        weights: w, shape (n,): a block, such as the weights into one unit.
        fisher: F, shape (n, n), symmetric, damped where it is singular.
        keep: Number of weights that are not zero, even where w is.
        bits: Bits of a kept weight besides its sign, 0 for a single level.
        scale: Value of level 1; None, the default, tries 21 and takes the one with the lowest cost
            of rounding; for a block of zeros it is the least whose square is a normal number.
        solver: `moves`, the default, repeats the best move among all levels of one weight and all
            swaps of a kept and a pruned weight; `annealed moves` begins with `reads` random walks
            by such moves, and goes on from each; `annealing` samples the QUBO by dwave-samplers,
            with penalties on the number of zeros, repairs what breaks it, and goes on from the best
            (`pip install fishleg_jax[selection]`).
        steps: Largest number of moves, 10,000 by default.
        reads: Number of walks or samples, 8 by default.
        sweeps: Number of proposals for each weight in one of them, 200 by default.
        seed: Seed of the random numbers, 0 by default.

    Returns:
        The weights, their levels and costs.  If numbers are not finite it is the start.

    Raises:
        ValueError: Mismatched shapes, an argument out of its range, or traced arrays for
            `annealing`, which runs on the host.
        ImportError: The solver is `annealing` and dwave-samplers is not installed.

    References:
        Frantar & Alistarh, Optimal brain compression, NeurIPS 2022, for the quadratic loss of
        pruning and quantisation together; Yu et al., The combinatorial brain surgeon, ICML 2022,
        for its search by swaps.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> weights = jnp.array([1.0, 0.6, 0.5])
        >>> fisher = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]])
        >>> found = flj.selection.quantise(weights, fisher, keep=2, bits=0, scale=1.0)
        >>> found.weights.tolist(), round(float(found.after), 3)  # one for the sum of two
        ([1.0, 1.0, 0.0], 0.025)
    """
    # Refuse invalid arguments.
    weights, fisher = as_floats(weights), as_floats(fisher)
    n = jnp.size(weights)
    if weights.shape != (n,) or n == 0:
        raise ValueError(f"weights must be an array of shape (n,), n > 0, got {weights.shape}")
    if fisher.shape != (n, n):
        raise ValueError(f"fisher must have shape {(n, n)}, got {fisher.shape}")
    keep, bits = check_count(keep, "keep"), check_count(bits, "bits", least=0)
    if keep > n or bits > 8:
        raise ValueError(f"keep must be at most {n} and bits at most 8, got {keep} and {bits}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {_text.shown(solver)}")
    if scale is not None:
        scale = check_positive(scale, "scale", " or None")
    steps, reads = check_count(steps, "steps"), check_count(reads, "reads")
    sweeps, seed = check_count(sweeps, "sweeps"), check_count(seed, "seed", least=0)

    # Start from the lowest scores and rounding, then search.
    top = 2**bits
    problem, start = jitted(_start, keep, top)(weights, fisher, scale)
    if solver == "annealing":
        return annealed(problem, start, bits, steps=steps, reads=reads, sweeps=sweeps, seed=seed)
    if solver == "moves":
        return jitted(_descended, top)(problem, start, start, steps)
    key = jax.random.key(seed)
    return jitted(_walked, top, reads)(problem, start, key, steps, sweeps)


def annealed(
    problem: Problem,
    start: jax.Array,
    bits: int,
    *,
    steps: int,
    reads: int,
    sweeps: int,
    seed: int,
    penalties: Sequence[float] = PENALTIES,
) -> Quantised:
    """The sampler's best read, and the best moves from there.

    Args:
        problem: The problem at its scale.
        start: Levels to compare with, which also give the number of kept weights.
        bits: Bits of a kept weight besides its sign.
        steps: Largest number of moves; 0 leaves the read as it is.
        reads: Number of samples, shared out among the penalties.
        sweeps: Number of passes over the binary variables in each of them.
        seed: Seed of the random numbers.
        penalties: Strengths of the penalty on the number of kept weights, see `sample`.

    Raises:
        ValueError: Traced arrays.
        ImportError: dwave-samplers is not installed.
    """
    refuse_traced((problem, start), "solver='annealing'", "solver='moves'")
    found = _sampled(problem, np.asarray(start), bits, reads, sweeps, seed, penalties)
    return jitted(_descended, 2**bits)(problem, start, jnp.asarray(found), steps)


def _start(keep: int, top: int, weights: jax.Array, fisher: jax.Array, scale: Any):
    """The problem at a scale, and the levels of scores and rounding."""
    score = weights**2 * jnp.diagonal(fisher)
    rank = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
    signs = jnp.where(weights < 0, -1.0, 1.0).astype(weights.dtype)

    def at_scale(scale):
        problem = Problem(weights, fisher, scale * signs)
        levels = jnp.clip(jnp.round(jnp.abs(weights) / scale), 1, top)
        levels = jnp.where(rank < keep, levels, 0).astype(jnp.int32)
        return problem, levels, _levels.cost(problem, levels)

    if scale is None:
        largest, tiny = jnp.max(jnp.abs(weights)), jnp.finfo(weights.dtype).tiny
        tried = jnp.maximum(largest / top * jnp.asarray(SCALES, weights.dtype), tiny)
        # level 1 is not zero even if all weights are, nor is its square
        tried = jnp.where(largest > 0, tried, jnp.sqrt(tiny))
        scale = tried[jnp.argmin(jax.lax.map(lambda s: at_scale(s)[2], tried))]
    return at_scale(jnp.asarray(scale, weights.dtype))[:2]


def _descended(top, problem, start, levels, steps) -> Quantised:
    """The end of the best moves from some levels."""
    return _finished(problem, start, _levels.descend(problem, levels, top, steps).levels)


def _walked(top, reads, problem, start, key, steps, sweeps) -> Quantised:
    """The best end of several random walks with the best moves after them."""

    def walk(key):
        levels = _levels.anneal(problem, start, top, key, sweeps)
        levels = _levels.descend(problem, levels, top, steps).levels
        return levels, _levels.cost(problem, levels)

    levels, costs = jax.vmap(walk)(jax.random.split(key, reads))
    return _finished(problem, start, levels[jnp.argmin(costs)])


def _finished(problem: Problem, start: jax.Array, levels: jax.Array) -> Quantised:
    before, after = _levels.cost(problem, start), _levels.cost(problem, levels)
    lower = (after < before) & jnp.isfinite(before)
    levels = jnp.where(lower, levels, start)
    scale = jnp.abs(problem.unit[0])
    after = jnp.where(lower, after, before)
    return Quantised(problem.unit * levels, levels, scale, before, after)


def _sampled(
    problem: Problem,
    start: np.ndarray,
    bits: int,
    reads: int,
    sweeps: int,
    seed: int,
    penalties: Sequence[float],
) -> np.ndarray:
    """The best of the sampler's reads, with the number of zeros repaired."""
    w, fisher, unit = (np.asarray(x, float) for x in problem)
    n, keep = len(w), int((start > 0).sum())
    if not np.isfinite(fisher).all() or not np.isfinite(w).all():
        return start
    # v = V z, with the mask bits first and then the bits of one power after the other
    powers = [1.0, *(2.0**k for k in range(bits))]
    of_bits = np.concatenate([np.diag(unit * power) for power in powers], axis=1)
    h, c = of_bits.T @ fisher @ of_bits, -of_bits.T @ fisher @ w
    binary = np.concatenate(
        [start > 0, *(((start - 1).clip(0) >> k) & 1 for k in range(bits))]
    ).astype(bool)
    members = (np.arange(len(c)) < n).astype(int)[None]
    # a bit without its mask bit costs as much as the dearest change of one bit at the start
    changes = c + h @ binary + np.where(binary, -0.5, 0.5) * np.diagonal(h)
    price = max(float(np.abs(changes).max()), np.finfo(float).tiny)
    for k in range(1, bits + 1):
        rows = np.arange(n)
        c[k * n : (k + 1) * n] += price
        h[rows, k * n + rows] -= price
        h[k * n + rows, rows] -= price
    found = [
        levels
        for share, part in zip(penalties, parts(reads, len(penalties)), strict=True)
        if part
        for levels in _levels_of(
            sample(c, h, members, np.array([keep]), binary, share, part, sweeps, seed), n, bits
        )
    ]
    repaired = [_repaired(levels, w, fisher, unit, keep, 2**bits) for levels in found]

    def cost(levels):
        error = unit * levels - w
        return error @ fisher @ error / 2

    return min(repaired, key=cost).astype(np.int32)


def _levels_of(samples: np.ndarray, n: int, bits: int) -> np.ndarray:
    """Levels of samples of the binary variables; bits without their mask bit count as zeros."""
    parts = samples.reshape(len(samples), bits + 1, n).astype(int)
    raised = sum((parts[:, k + 1] << k for k in range(bits)), np.zeros_like(parts[:, 0]))
    return parts[:, 0] * (1 + raised)


def _repaired(
    levels: np.ndarray, w: np.ndarray, fisher: np.ndarray, unit: np.ndarray, keep: int, top: int
) -> np.ndarray:
    """Restores the number of kept weights, by the cheapest changes of one weight."""
    levels = levels.copy()
    diagonal = np.diagonal(fisher)
    while (surplus := int((levels > 0).sum()) - keep) != 0:
        slope = fisher @ (unit * levels - w)
        if surplus > 0:
            to = np.zeros_like(levels)
        else:
            ideal = -slope / (unit * np.maximum(diagonal, np.finfo(float).tiny))
            to = np.clip(np.round(ideal), 1, top).astype(int)
        d = unit * (to - levels)
        changes = d * slope + d**2 * diagonal / 2
        i = int(np.argmin(np.where((levels > 0) == (surplus > 0), changes, np.inf)))
        levels[i] = to[i]
    return levels
