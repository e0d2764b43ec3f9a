"""Solvers of one block of weights, and their energies on several."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.quantise import genetic
from fishleg_jax.pruning.selection import _annealing, _quantise
from fishleg_jax.pruning.selection._levels import Problem

BEST = "brute force"
STEPS = 10_000  # most moves after a sampler; `without moves`: none
# penalties of the sampler, in units of the largest change by one weight, and the moves after it
SAMPLERS = {
    "annealing": (_annealing.PENALTIES, STEPS),
    "hard penalty": ((10.0,), STEPS),
    "annealing without moves": (_annealing.PENALTIES, 0),
    "hard penalty without moves": ((10.0,), 0),
}
SOLVERS = ("rounding", "moves", "annealed moves", *SAMPLERS, "genetic")
READS, SWEEPS, GENERATIONS = 8, 200, 100


class Block(NamedTuple):
    """Weights into one output, their Fisher, and the number of weights to keep."""

    weights: np.ndarray
    fisher: np.ndarray
    keep: int


def solve(solver: str, block: Block, bits: int, seed: int) -> float:
    """Energy at which a solver ends on a block, `½ (v − w)ᵀF(v − w)`.

    Args:
        solver: One of `SOLVERS`, or `BEST`.
        block: The block.
        bits: Bits of a kept weight besides its sign.
        seed: Seed of the random numbers.
    """
    options = {"keep": block.keep, "bits": bits, "seed": seed}
    if solver in ("moves", "annealed moves"):
        options |= {"reads": READS, "sweeps": SWEEPS}
        found = flj.selection.quantise(block.weights, block.fisher, solver=solver, **options)
        return float(found.after)
    # All others start from the same rounding, at its scale.
    first = flj.selection.quantise(block.weights, block.fisher, steps=1, **options)
    if solver == "rounding":
        return float(first.before)
    scale, top = float(first.scale), 2**bits
    unit = scale * np.where(block.weights < 0, -1.0, 1.0)
    start = rounded(block, scale, top)
    if solver in SAMPLERS:
        penalties, steps = SAMPLERS[solver]
        problem = Problem(*(jnp.asarray(x, jnp.float32) for x in (*block[:2], unit)))
        found = _quantise.annealed(
            *(problem, jnp.asarray(start, jnp.int32), bits),
            steps=steps,
            reads=READS,
            sweeps=SWEEPS,
            seed=seed,
            penalties=penalties,
        )
        return float(found.after)
    w, fisher = np.asarray(block.weights, float), np.asarray(block.fisher, float)
    if solver == "genetic":
        options = {"top": top, "generations": GENERATIONS, "seed": seed}
        levels = genetic.search(start, w, fisher, unit, **options)
    else:
        levels = genetic.brute_force(block.keep, w, fisher, unit, top=top)
    return float(genetic.cost(levels, w, fisher, unit))


def rounded(block: Block, scale: float, top: int) -> np.ndarray:
    """Levels of the weights with the largest scores, rounded; 0 for all others."""
    kept = np.argsort(-(block.weights**2) * np.diagonal(block.fisher), kind="stable")[: block.keep]
    levels = np.zeros(len(block.weights), int)
    levels[kept] = np.clip(np.round(np.abs(block.weights[kept]) / scale), 1, top)
    return levels


def measured(solver: str, blocks: Sequence[Block], bits: int, seed: int) -> dict[str, Any]:
    """Energies of a solver on all blocks, and its seconds for one, without compilation."""
    if solver not in ("genetic", BEST):
        for block in {len(block.weights): block for block in blocks}.values():
            solve(solver, block, bits, seed)  # compiles
    begin = time.perf_counter()
    energies = [solve(solver, block, bits, seed + i) for i, block in enumerate(blocks)]
    return {"energies": energies, "seconds": (time.perf_counter() - begin) / len(blocks)}
