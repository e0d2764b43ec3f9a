"""Pruning and quantisation as one QUBO, against all possibilities on small blocks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from experiments.quantise import genetic
from fishleg_jax.pruning.selection import _annealing, _quantise

quantise = flj.selection.quantise


def block(seed, n):
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(2 * n, n)) @ rng.normal(size=(n, n))
    return rng.normal(size=n), samples.T @ samples / (2 * n)


def cost(values, weights, fisher):
    error = np.asarray(values, float) - weights
    return error @ fisher @ error / 2


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(0, 2))
def test_moves_keep_the_count_the_signs_and_the_levels(seed, keep, bits):
    weights, fisher = block(seed, 6)
    found = quantise(weights, fisher, keep=keep, bits=bits)
    levels = np.asarray(found.levels)
    assert (levels > 0).sum() == keep and levels.min() >= 0 and levels.max() <= 2**bits
    values = np.where(weights < 0, -1, 1) * float(found.scale) * levels
    np.testing.assert_allclose(found.weights, values, rtol=1e-6)
    np.testing.assert_allclose(found.after, cost(values, weights, fisher), rtol=1e-4, atol=1e-6)
    assert found.after <= found.before


def test_no_move_lowers_the_cost_at_the_end():
    for seed in range(5):
        weights, fisher = block(seed, 6)
        found = quantise(weights, fisher, keep=3, bits=1)
        unit = float(found.scale) * np.where(weights < 0, -1, 1)
        levels, lowest = np.asarray(found.levels), float(found.after)
        for i, j in itertools.product(range(6), repeat=2):
            for to in (1, 2):
                other = levels.copy()
                if levels[i] > 0 and i == j:
                    other[i] = to
                elif levels[i] > 0 and levels[j] == 0:
                    other[i], other[j] = 0, to
                assert cost(unit * other, weights, fisher) >= lowest * (1 - 1e-5)


@pytest.mark.parametrize("solver", ["annealed moves", "annealing"])
def test_annealing_finds_the_best_of_all(solver):
    if solver == "annealing":
        pytest.importorskip("dwave.samplers")
    ratios = []
    for seed in range(5):
        weights, fisher = block(seed, 6)
        found = quantise(weights, fisher, keep=3, bits=1, solver=solver, reads=16)
        assert (np.asarray(found.levels) > 0).sum() == 3
        unit = float(found.scale) * np.where(weights < 0, -1, 1)
        best = genetic.brute_force(3, weights, fisher, unit, top=2)
        ratios.append(float(found.after) / cost(unit * best, weights, fisher))
    assert np.median(ratios) < 1 + 1e-4 and min(ratios) > 1 - 1e-4


def test_all_weights_on_fine_levels_are_rounded():
    weights = np.array([0.5, -0.25, 1.0, 0.75])
    found = quantise(weights, np.eye(4), keep=4, bits=2, scale=0.25)
    assert found.levels.tolist() == [2, 1, 4, 3] and found.after == 0


def test_kept_weights_make_up_for_others():
    # two equal inputs: one weight of 1 does what two of 0.5 do
    fisher = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 4.0]]) + 1e-6 * np.eye(3)
    found = quantise(np.array([0.5, 0.5, 1.0]), fisher, keep=2, bits=1, scale=0.5)
    assert found.levels[2] == 2 and sorted(found.levels[:2].tolist()) == [0, 2]
    assert found.after < 1e-5 < found.before


def test_rows_at_once_in_one_compilation():
    fisher = jnp.asarray(block(0, 6)[1])
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)))
    solve = jax.jit(jax.vmap(lambda row: quantise(row, fisher, keep=3, bits=1)))
    together = solve(rows)
    for row, levels in zip(rows, together.levels, strict=True):
        assert (quantise(row, fisher, keep=3, bits=1).levels == levels).all()


def test_numbers_that_are_not_finite_leave_the_start():
    weights, fisher = block(0, 4)
    fisher[0, 1] = np.nan
    found = quantise(weights, fisher, keep=2, bits=1, scale=0.5)
    assert (np.asarray(found.levels) > 0).sum() == 2


@pytest.mark.parametrize("solver", ["moves", "annealed moves", "annealing"])
@pytest.mark.parametrize("weights", [np.zeros(4), np.full(4, -1e-30), np.array([0, 0, 1.0, 0])])
def test_weights_of_zero_are_kept_too(weights, solver):
    if solver == "annealing":
        pytest.importorskip("dwave.samplers")
    found = quantise(weights, np.eye(4) + 0.3, keep=3, bits=1, solver=solver)
    assert (np.asarray(found.weights) != 0).sum() == 3
    assert (np.asarray(found.levels) > 0).sum() == 3
    assert found.scale > 0 and found.after <= found.before


def test_scales_follow_small_weights_in_half_precision():
    fisher = jnp.eye(4, dtype=jnp.float16)
    small, large = (
        quantise(jnp.asarray([0.5, 1.0, 0.75, 0.25], jnp.float16) * by, fisher, keep=3, bits=2)
        for by in (2.0**-7, 1.0)
    )
    assert (small.levels == large.levels).all() and small.scale / large.scale < 0.02


@pytest.mark.filterwarnings("error")  # of mixed types, which later become errors
@pytest.mark.parametrize("solver", ["moves", "annealed moves"])
def test_double_precision(x64, solver):
    weights, fisher = block(0, 12)
    found = quantise(weights, fisher, keep=6, bits=2, solver=solver)
    assert found.weights.dtype == jnp.float64 and found.after < found.before


def test_the_penalties_reach_the_sampler(monkeypatch):
    pytest.importorskip("dwave.samplers")
    weights, fisher = block(0, 6)
    problem, start = _quantise._start(3, 2, jnp.asarray(weights), jnp.asarray(fisher), None)
    seen, sample = [], _quantise.sample

    def noting(*rest):
        seen.append(rest[5:7])
        return sample(*rest)

    monkeypatch.setattr(_quantise, "sample", noting)
    options = {"steps": 0, "reads": 4, "sweeps": 10, "seed": 0}
    _quantise.annealed(problem, start, 1, penalties=(10.0,), **options)
    assert seen == [(10.0, 4)]
    _quantise.annealed(problem, start, 1, **options)
    assert [share for share, _ in seen[1:]] == list(_annealing.PENALTIES)


def test_annealing_refuses_to_be_traced():
    weights, fisher = block(0, 4)
    solve = lambda w: quantise(w, fisher, keep=2, bits=1, solver="annealing").weights
    with pytest.raises(ValueError, match="outside of jax.jit.*solver='moves'"):
        jax.jit(solve)(weights)
    with pytest.raises(ValueError, match="outside of jax.jit.*solver='moves'"):
        jax.jit(lambda: solve(weights))()  # no argument is traced
    with pytest.raises(ValueError, match="outside of jax.jit.*solver='moves'"):
        jax.vmap(solve)(weights[None])


def test_genetic_search_never_ends_above_its_start():
    weights, fisher = block(3, 8)
    unit, start = 0.5 * np.where(weights < 0, -1, 1), np.array([1, 1, 1, 1, 0, 0, 0, 0])
    found = genetic.search(start, weights, fisher, unit, top=2, generations=20, seed=0)
    assert (found > 0).sum() == 4
    costs = [genetic.cost(x, weights, fisher, unit) for x in (found, start)]
    assert costs[0] < costs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, "keep"),
        ({"keep": 5}, "keep must be at most 4"),
        ({"bits": 9}, "bits"),
        ({"solver": "swaps"}, "solver must be one of"),
        ({"scale": -1.0}, "scale"),
        ({"fisher": np.eye(3)}, "fisher must have shape"),
        ({"weights": np.ones((2, 2))}, "weights must be"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {"weights": np.ones(4), "fisher": np.eye(4), "keep": 2, "bits": 1} | changes
    with pytest.raises(ValueError, match=message):
        quantise(arguments.pop("weights"), arguments.pop("fisher"), **arguments)
