"""Cells by curvature: against all allotments there are, and against the closed form."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_jax import storage
from fishleg_jax.storage import marginal

UNIT = storage.gaussian(1.0)  # a variance of 1 for weights in a range of 1
COST = st.floats(0, 100, width=32) | st.sampled_from([0.0, 1.0])
COSTS = st.sampled_from([1, 4]).flatmap(lambda n: st.lists(COST, min_size=n, max_size=n))


def rise(fisher, cells):
    return 0.5 * float((np.asarray(fisher, float) / np.asarray(cells)).sum())


def ones(fisher):
    return jnp.ones(len(fisher)), jnp.asarray(fisher, jnp.float32)


@settings(max_examples=40, deadline=None)
@given(COSTS, st.integers(0, 7))
def test_no_allotment_of_as_many_cells_is_better(fisher, more):
    params, diagonal = ones(fisher)
    budget = len(fisher) + more
    found = np.asarray(storage.allot(diagonal, params, cells=budget, cell=UNIT))
    assert found.min() >= 1 and found.sum() <= budget
    assert found.sum() == budget or not any(fisher)
    every = itertools.product(range(1, more + 2), repeat=len(fisher))
    best = min(rise(fisher, cells) for cells in every if sum(cells) <= budget)
    np.testing.assert_allclose(rise(fisher, found), best, rtol=1e-6, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(COSTS, st.floats(0.2, 2))
def test_no_smaller_allotment_reaches_the_rise(fisher, share):
    params, diagonal = ones(fisher)
    wanted = share * max(rise(fisher, np.ones(len(fisher))), 1e-3)
    found = np.asarray(storage.allot(diagonal, params, rise=wanted, cell=UNIT))
    assert rise(fisher, found) <= wanted * (1 + 1e-6)
    fewer = int(found.sum()) - 1
    every = itertools.product(range(1, 12), repeat=len(fisher))
    for cells in every if fewer < 24 else ():
        if sum(cells) == fewer:
            assert rise(fisher, cells) > wanted * (1 - 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(COST, min_size=6, max_size=6), st.integers(6, 18))
def test_rows_share_their_number_at_nearly_the_least_rise(fisher, budget):
    """Of all numbers for three rows, one of them with a pruned weight."""
    diagonal = jnp.asarray(fisher, jnp.float32).reshape(3, 2)
    params = jnp.ones((3, 2)).at[2, 1].set(0)  # a row of one weight
    needed = np.asarray(params) != 0
    found = np.asarray(storage.allot(diagonal, params, cells=budget, cell=UNIT, shared=-1))
    assert (found[:2, 0] == found[:2, 1]).all() and found[2, 1] == 0
    assert found.sum() <= budget
    sizes, own = needed.sum(1), np.where(needed, np.asarray(diagonal, float), 0).sum(1)
    rises = {
        n: 0.5 * (own / n).sum()
        for n in itertools.product(range(1, 17), repeat=3)
        if (sizes * n).sum() <= budget
    }
    ours = rises[tuple(found[:, 0].tolist())]
    fewer = [r for n, r in rises.items() if (sizes * n).sum() <= budget - 1]
    assert ours <= min(fewer, default=math.inf) * (1 + 1e-6) + 1e-12


def test_a_large_group_gives_way_where_a_small_one_costs_fewer_cells():
    """Steps in order of their fall per cell take 22 cells here."""
    params = {"large": jnp.ones((1, 5)), "small": jnp.ones((1, 1))}
    fisher = {"large": jnp.full((1, 5), 0.26982064), "small": jnp.full((1, 1), 2.13197018)}
    found = storage.allot(fisher, params, rise=0.47828, cell=UNIT, shared=-1)
    assert found["large"].tolist() == [[2] * 5] and found["small"].tolist() == [[8]]
    assert storage.expected_rise(fisher, params, found, cell=UNIT) <= 0.47828
    # the next step in order, of the large group, does not fit; one of the small group does
    found = storage.allot(fisher, params, cells=18, cell=UNIT, shared=-1)
    assert sum(int(n.sum()) for n in jax.tree.leaves(found)) == 18


def steps_in_order(costs, sizes):
    """Steps from one cell each in the order of their fall per cell: groups, falls."""
    every = [
        (-c / (n * (n + 1)), i, s * c / (n * (n + 1)))
        for i, (c, s) in enumerate(zip(costs, sizes, strict=True))
        for n in range(1, 60)
    ]
    return [(i, fall) for _, i, fall in sorted(every)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 14))
def test_groups_of_different_sizes_come_within_a_step_of_the_best(seed, more):
    """Against all numbers there are, and never worse than steps in order alone."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(2, 4))
    sizes, costs = rng.integers(1, 6, groups), rng.gamma(0.5, size=groups) + 1e-6
    every = np.array(list(itertools.product(range(1, 21), repeat=groups)))
    taken, rises = every @ sizes, (sizes * costs / every).sum(axis=1)

    budget = int(sizes.sum()) + more
    found = marginal.for_number(costs, sizes, budget)
    assert found.min() >= 1 and sizes @ found <= budget
    ours, best = (sizes * costs / found).sum(), rises[taken <= budget].min()
    left, in_order = more, (sizes * costs).sum()
    for i, fall in steps_in_order(costs, sizes):
        if sizes[i] > left:
            break
        left, in_order = left - sizes[i], in_order - fall
    assert ours <= in_order * (1 + 1e-9) and ours < best + fall

    # a share that no allotment has exactly: equality hangs on rounding
    rise = rng.uniform(0.2, 0.95) * (sizes * costs).sum()
    found = marginal.for_rise(costs, sizes, rise)
    assert found.min() >= 1 and (sizes * costs / found).sum() <= rise * (1 + 1e-9)
    cells, reached = sizes.sum(), (sizes * costs).sum()
    for i, fall in steps_in_order(costs, sizes):
        if reached <= rise:
            break
        cells, reached = cells + sizes[i], reached - fall
    assert sizes @ found <= cells and sizes @ found < taken[rises <= rise].min() + sizes.max()


def test_groups_of_different_sizes_mostly_have_the_best_allotment():
    rng = np.random.default_rng(0)
    worse = np.zeros(2, int)
    for _ in range(200):
        sizes, costs = rng.integers(1, 6, 3), rng.gamma(0.5, size=3)
        every = np.array(list(itertools.product(range(1, 15), repeat=3)))
        taken, rises = every @ sizes, (sizes * costs / every).sum(axis=1)
        budget = int(sizes.sum() + rng.integers(0, 12))
        found = marginal.for_number(costs, sizes, budget)
        worse[0] += (sizes * costs / found).sum() > rises[taken <= budget].min() * (1 + 1e-9)
        rise = rng.uniform(0.2, 0.9) * (sizes * costs).sum()
        found = marginal.for_rise(costs, sizes, rise)
        worse[1] += sizes @ found > taken[rises <= rise].min()
    assert (worse <= 10).all(), worse  # steps in order alone: 54 and 40


def test_groups_of_one_size_have_the_best_allotment():
    rng = np.random.default_rng(1)
    sizes = np.full(3, 4)
    every = np.array(list(itertools.product(range(1, 15), repeat=3)))
    for _ in range(50):
        costs = rng.gamma(0.5, size=3)
        taken, rises = every @ sizes, (sizes * costs / every).sum(axis=1)
        budget = int(sizes.sum() + rng.integers(0, 40))
        found = marginal.for_number(costs, sizes, budget)
        best = rises[taken <= budget].min()
        np.testing.assert_allclose((sizes * costs / found).sum(), best, rtol=1e-9)
        rise = rng.uniform(0.3, 0.9) * (sizes * costs).sum()
        assert sizes @ marginal.for_rise(costs, sizes, rise) == taken[rises <= rise].min()


def test_axes_that_share_their_numbers():
    params = {"w": jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), "b": jnp.arange(1.0, 6)}
    fisher = jax.tree.map(lambda w: jnp.arange(1.0, w.size + 1).reshape(w.shape), params)
    find = lambda shared: storage.allot(fisher, params, cells=1000, cell=UNIT, shared=shared)
    for shared, sizes in ((-1, (24, 1)), ((0, 1), (20, 1)), ((-1, -2, 1), (2, 1)), (3, (24, 1))):
        found = find(shared)
        spread = [found["w"].max(axis=shared) - found["w"].min(axis=shared), jnp.ptp(found["b"])]
        if shared != (0, 1):
            assert not any(x.any() for x in spread)
        assert [x.size for x in (spread[0], spread[1])] == list(sizes)
    assert jnp.ptp(find(None)["b"]) > 0
    own, rows = (storage.expected_rise(fisher, params, find(s), cell=UNIT) for s in (None, -1))
    equal = storage.expected_rise(fisher, params, storage.equal(params, 1000), cell=UNIT)
    assert own < rows < equal
    fewest = storage.allot(fisher, params, rise=rows, cell=UNIT, shared=-1)
    assert sum(int(n.sum()) for n in jax.tree.leaves(fewest)) <= 1000


def test_many_cells_are_in_proportion_to_the_closed_form():
    fisher = np.random.default_rng(0).lognormal(0, 2, 300)
    params = jnp.linspace(0.2, 1, 300) * jnp.where(jnp.arange(300) % 2, 1, -1)
    cell = storage.pcm()
    found = np.asarray(storage.allot(jnp.asarray(fisher), params, cells=10**7, cell=cell))
    weights = np.sqrt(fisher * np.asarray(storage.variances(params, cell=cell), float))
    assert found.sum() == 10**7
    np.testing.assert_allclose(found, 10**7 * weights / weights.sum(), atol=1)
    # the loss of the closed form is (Σ √F σ)² / 2N
    expected = storage.expected_rise(jnp.asarray(fisher), params, jnp.asarray(found), cell=cell)
    np.testing.assert_allclose(expected, weights.sum() ** 2 / 2e7, rtol=1e-4)


def test_trees_zeros_and_equal_allotment():
    params = {"w": jnp.array([[1.0, 0.0], [-1.0, 0.5]]), "b": jnp.zeros(2)}
    fisher = jax.tree.map(lambda w: jnp.full(w.shape, 2.0), params)
    found = storage.allot(fisher, params, cells=9, cell=UNIT)
    assert found["w"].tolist() == [[3, 0], [3, 3]] and found["b"].tolist() == [0, 0]
    assert found["w"].dtype == jnp.int32
    assert storage.expected_rise(fisher, params, found, cell=UNIT) == 1.0
    open_zeros = storage.Coding(zeros=False)
    all_of_them = storage.allot(fisher, params, cells=9, cell=UNIT, coding=open_zeros)
    assert min(int(n.min()) for n in jax.tree.leaves(all_of_them)) == 1
    assert storage.equal(params, 7)["w"].tolist() == [[2, 0], [2, 3]]
    assert sum(int(n.sum()) for n in jax.tree.leaves(storage.equal(params, 13, coding=open_zeros)))
    many = storage.equal(jnp.ones(1000), 1500)
    assert int(many.sum()) == 1500 and set(np.asarray(many).tolist()) == {1, 2}
    assert int(many[:500].sum()) == 750


def test_weights_without_curvature_take_one_cell():
    params = jnp.ones(4)
    found = storage.allot(jnp.array([0.0, 0.0, 1.0, 4.0]), params, cells=20, cell=UNIT)
    assert found[:2].tolist() == [1, 1] and int(found.sum()) == 20
    assert storage.allot(jnp.zeros(4), params, cells=20, cell=UNIT).tolist() == [1] * 4
    exact = storage.gaussian(0.0)
    assert storage.allot(jnp.ones(4), params, rise=1e-9, cell=exact).tolist() == [1] * 4


def test_the_expected_rise_is_that_of_the_noise():
    """On a quadratic loss, whose mean over noise is the formula."""
    fisher = jnp.array([4.0, 1.0, 0.5, 0.0])
    params = jnp.array([0.5, -0.5, 0.4, 1.0])
    cell, cells = storage.gaussian(0.05, read=0.02), jnp.array([1, 2, 3, 4])
    keys = jax.random.split(jax.random.key(0), (2000, 2))

    @jax.vmap
    def loss(keys):
        found = storage.read(storage.write(params, cells, keys[0], cell=cell), keys[1])
        return 0.5 * (fisher * (found - params) ** 2).sum()

    expected = storage.expected_rise(fisher, params, cells, cell=cell)
    measured = np.asarray(loss(keys))
    assert abs(measured.mean() - expected) < 4 * measured.std() / 2000**0.5
    assert measured.std() / 2000**0.5 < 0.05 * expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, w: storage.allot(f, w), "exactly one of cells and rise"),
        (lambda f, w: storage.allot(f, w, cells=9, rise=1.0), "exactly one of cells and rise"),
        (lambda f, w: storage.allot(f, w, cells=2), "cells must be at least 3"),
        (lambda f, w: storage.allot(f, w, rise=0.0), "rise must be a positive"),
        (lambda f, w: storage.allot(-f, w, cells=9), "fisher_diagonal: .* at least 0"),
        (lambda f, w: storage.allot([f], w, cells=9), "fisher_diagonal must have the structure"),
        (lambda f, w: storage.allot(f[:2], w, cells=9), "fisher_diagonal: .* must have shape"),
        (lambda f, w: storage.allot(f, w, cells=9, shared=0.5), "shared must be an axis"),
        (lambda f, w: storage.allot(f, w, cells=9, shared="rows"), "shared must be an axis"),
        (lambda f, w: storage.equal(w, 2), "cells must be at least 3"),
        (lambda f, w: storage.expected_rise(f, w, 0), "cells must be a whole number"),
        (lambda f, w: jax.jit(lambda f: storage.allot(f, w, cells=9))(f), "outside of jit"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(3), jnp.ones(3))
