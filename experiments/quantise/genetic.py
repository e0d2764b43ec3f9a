"""Genetic search and brute force among weights on levels, to compare with."""

import itertools

import numpy as np

POPULATION = 64
MUTATIONS = 2  # moves of each child, on average one of them a swap


def cost(levels: np.ndarray, weights: np.ndarray, fisher: np.ndarray, unit: np.ndarray):
    """Cost `½ (v − w)ᵀF(v − w)` of one set of levels, or of many, `(sets, n)`."""
    error = unit * levels - weights
    return ((error @ fisher) * error).sum(axis=-1) / 2


def search(
    start: np.ndarray,
    weights: np.ndarray,
    fisher: np.ndarray,
    unit: np.ndarray,
    *,
    top: int,
    generations: int,
    seed: int,
) -> np.ndarray:
    """Tournaments of two, uniform crossover with the number of zeros restored, and random moves.

    Args:
        start: levels that the first population varies.
        weights: w, shape (n,).
        fisher: F, shape (n, n).
        unit: value of level 1 of each weight.
        top: highest level.
        generations: number of generations; the best of one lives on in the next.
        seed: of the random numbers.

    Returns:
        The best levels found.
    """
    rng = np.random.default_rng(seed)
    keep = int((start > 0).sum())
    found = np.stack([start, *(_mutated(start, rng, top, 8) for _ in range(POPULATION - 1))])
    costs = cost(found, weights, fisher, unit)
    for _ in range(generations):
        pairs = rng.integers(0, POPULATION, (2, POPULATION - 1, 2))
        winners = np.where(
            costs[pairs[..., 0]] <= costs[pairs[..., 1]], pairs[..., 0], pairs[..., 1]
        )
        mothers, fathers = found[winners[0]], found[winners[1]]
        children = np.where(rng.random(mothers.shape) < 0.5, mothers, fathers)
        children = [
            _mutated(_restored(child, keep, rng, top), rng, top, MUTATIONS) for child in children
        ]
        found = np.stack([found[costs.argmin()], *children])
        costs = cost(found, weights, fisher, unit)
    return found[costs.argmin()]


def _restored(levels: np.ndarray, keep: int, rng: np.random.Generator, top: int) -> np.ndarray:
    levels, surplus = levels.copy(), int((levels > 0).sum()) - keep
    if surplus:
        chosen = rng.permutation(np.flatnonzero((levels > 0) == (surplus > 0)))[: abs(surplus)]
        levels[chosen] = 0 if surplus > 0 else rng.integers(1, top + 1, len(chosen))
    return levels


def _mutated(levels: np.ndarray, rng: np.random.Generator, top: int, moves: int) -> np.ndarray:
    levels = levels.copy()
    for _ in range(moves):
        kept, pruned = np.flatnonzero(levels > 0), np.flatnonzero(levels == 0)
        i = rng.choice(kept)
        if len(pruned) and rng.random() < 0.5:
            levels[rng.choice(pruned)], levels[i] = rng.integers(1, top + 1), 0
        else:
            levels[i] = rng.integers(1, top + 1)
    return levels


def brute_force(
    keep: int, weights: np.ndarray, fisher: np.ndarray, unit: np.ndarray, *, top: int
) -> np.ndarray:
    """The best levels of all, among `C(n, keep) · top**keep`."""
    n, best, lowest = len(weights), None, np.inf
    values = np.array(list(itertools.product(range(1, top + 1), repeat=keep)))
    for kept in itertools.combinations(range(n), keep):
        levels = np.zeros((len(values), n), int)
        levels[:, kept] = values
        costs = cost(levels, weights, fisher, unit)
        if costs.min() < lowest:
            best, lowest = levels[costs.argmin()], costs.min()
    return best
