"""Forms by dense algebra: exact at full rank, optimal below it, within budgets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_jax.low_rank import choice, forms
from fishleg_jax.low_rank.budget import RULES
from fishleg_jax.low_rank.uses import Use

SIZES = st.integers(1, 5)
FORMS = st.sampled_from(["svd", "channel", "spatial", "tucker2"])


def use_of(form):
    if form == "svd":
        return Use((0, 1), 1, (), (), 1.0)
    return Use((0, 1, 2, 3), 1, (5, 6), (4, 3), 1.0)


def kernel_of(form, sizes, seed):
    return np.random.default_rng(seed).normal(size=sizes[2:] if form == "svd" else sizes)


def moments_of(form, kernel, seed):
    """Positive definite metrics of the folded kernel."""
    rng, shape = np.random.default_rng(seed), forms.fold(form, kernel).shape[-2:]
    roots = [rng.normal(size=(n, n + 2)) for n in shape]
    return tuple(x @ x.T for x in roots)


def product(form, factors):
    """The kernel that factors stand for."""
    if form == "tucker2":
        first, core, last = (factors[x] for x in ("first", "core", "last"))
        return np.einsum("ir,...rt,to->...io", first[0, 0], core, last[0, 0])
    if form == "spatial":
        return np.einsum("hir,wro->hwio", factors["left"][:, 0], factors["right"][0])
    right = factors["right"]
    return factors["left"] @ right.reshape(right.shape[-2:])


def index_of(options, ranks):
    return int(np.flatnonzero((options.ranks == ranks).all(axis=1))[0])


@given(FORMS, st.tuples(SIZES, SIZES, SIZES, SIZES), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_full_rank_is_exact(form, sizes, seed, fisher):
    kernel = kernel_of(form, sizes, seed)
    moments = moments_of(form, kernel, seed) if fisher else None
    options = forms.options_of(form, kernel, use_of(form), moments, 1e-3)
    factors = options.factors(tuple(options.ranks.max(axis=0)))
    np.testing.assert_allclose(product(form, factors), kernel, atol=1e-9 * np.abs(kernel).max())
    full = index_of(options, options.ranks.max(axis=0))
    assert options.loss[full] <= 1e-12 * options.whole
    assert options.weights[full] == sum(x.size for x in factors.values())


@pytest.mark.parametrize("form", ["svd", "channel", "spatial", "tucker2"])
def test_the_predicted_loss_is_that_of_the_metric(form):
    kernel = kernel_of(form, (3, 2, 5, 4), 0)
    a, b = moments_of(form, kernel, 1)
    options = forms.options_of(form, kernel, use_of(form), (a, b), 1e-9)
    for ranks in options.ranks[:: max(len(options.ranks) // 5, 1)]:
        factors = options.factors(tuple(ranks))
        error = forms.fold(form, kernel - product(form, factors))
        wanted = np.einsum("...ij,ik,...kl,jl->...", error, a, error, b).sum() / 2
        found = options.loss[index_of(options, ranks)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9 * options.whole)


@given(st.integers(0, 99), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_no_other_matrix_of_the_rank_is_better(seed, rank):
    kernel = kernel_of("svd", (1, 1, 5, 4), seed)
    a, b = moments_of("svd", kernel, seed)
    rise = lambda error: np.einsum("ij,ik,kl,jl->", error, a, error, b) / 2
    best = forms.options_of("svd", kernel, use_of("svd"), (a, b), 1e-12)
    factors = best.factors((rank,))
    lowest = rise(kernel - product("svd", factors))
    plain = forms.options_of("svd", kernel, use_of("svd"), None, 1e-12).factors((rank,))
    assert lowest <= rise(kernel - product("svd", plain)) * (1 + 1e-9)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        near = {k: x + 0.05 * rng.normal(size=x.shape) for k, x in factors.items()}
        assert rise(kernel - product("svd", near)) > lowest


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2"])
def test_operations_of_a_kernel_with_all_sizes(form):
    """By hand: a 3 x 2 kernel from 5 x 6 to 4 x 3 images."""
    kernel = np.ones((3, 2, 5, 7))
    options = forms.options_of(form, kernel, use_of(form), None, 1e-3)
    assert options.dense == (210.0, 2 * 210 * 12)
    ranks = (2, 3) if form == "tucker2" else (2,)
    wanted = {
        "channel": 2 * 12 * (3 * 2 * 5 * 2 + 2 * 7),
        "spatial": 2 * (4 * 6 * 3 * 5 * 2 + 12 * 2 * 2 * 7),
        "tucker2": 2 * (30 * 5 * 2 + 12 * 3 * 2 * 2 * 3 + 12 * 3 * 7),
    }
    assert options.flops[index_of(options, ranks)] == wanted[form]


@st.composite
def networks(draw):
    """Choices of several kernels, and a budget between the cheapest and the whole."""
    unit, choices = draw(st.sampled_from(["weights", "flops"])), []
    for seed in range(draw(st.integers(1, 4))):
        form = draw(FORMS)
        sizes = draw(st.tuples(SIZES, SIZES, st.integers(1, 9), st.integers(1, 9)))
        options = forms.options_of(form, kernel_of(form, sizes, seed), use_of(form), None, 1e-3)
        choices.append(choice.choices_of(options, unit))
    least, most = (sum(x.cost[k] for x in choices) for k in (0, -1))
    return choices, least + draw(st.floats(0, 1.2)) * (most - least)


@given(networks(), st.sampled_from(["global", "equal", "energy"]))
@settings(max_examples=80, deadline=None)
def test_ranks_never_exceed_budgets(network, rule):
    choices, budget = network
    picked = RULES[rule](choices, budget)
    assert sum(x.cost[k] for x, k in zip(choices, picked, strict=True)) <= budget * (1 + 1e-12)
    if budget >= sum(x.cost[-1] for x in choices):
        assert sum(x.loss[k] for x, k in zip(choices, picked, strict=True)) == 0


@given(networks())
@settings(max_examples=60, deadline=None)
def test_the_global_threshold_is_best_at_its_own_cost(network):
    """Against all choices of the same or a lower cost, before what is left of a budget is spent."""
    choices, budget = network
    picked = choice.by_threshold(choices, budget)
    lost = sum(x.loss[k] for x, k in zip(choices, picked, strict=True))
    for rule in ("equal", "energy"):
        other = RULES[rule](choices, budget)
        cost = sum(x.cost[k] for x, k in zip(choices, other, strict=True))
        # at a corner of the hull nothing of that cost is better
        corner = choice.by_threshold(choices, most_loss=lost)
        spent = sum(x.cost[k] for x, k in zip(choices, corner, strict=True))
        if cost <= spent:
            worse = sum(x.loss[k] for x, k in zip(choices, other, strict=True))
            reached = sum(x.loss[k] for x, k in zip(choices, corner, strict=True))
            assert worse >= reached * (1 - 1e-9) - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_threshold_on_relative_errors(seed):
    """The minimum of its loss, which is linear in probabilities; no more than the same sum."""
    rng = np.random.default_rng(seed)
    choices = []
    for decay in (0.3, 0.8, 0.6):
        left, right = (np.linalg.qr(rng.normal(size=(12, 12)))[0] for _ in range(2))
        values = rng.uniform(0.1, 10) * decay ** (np.arange(12) + rng.uniform(size=12))
        options = forms.options_of("svd", left * values @ right, use_of("svd"), None, 1e-3)
        choices.append(choice.choices_of(options, "weights"))
    budget = (0.4, 0.5, 0.6)[seed] * sum(x.cost[-1] for x in choices)
    picked = RULES["search"](choices, budget)
    assert picked[0] < picked[1]  # the flatter spectrum needs more
    relative = [x._replace(loss=x.loss / x.whole) for x in choices]
    spent = lambda chosen: sum(x.cost[k] for x, k in zip(choices, chosen, strict=True))
    lost = lambda chosen: sum(x.loss[k] for x, k in zip(relative, chosen, strict=True))
    threshold = choice.by_threshold(relative, spent(picked))
    np.testing.assert_allclose(lost(picked), lost(threshold), rtol=1e-9)
    # the next corner of the threshold is out of budget
    beyond = choice.by_threshold(relative, most_loss=lost(picked) * (1 - 1e-9))
    assert spent(picked) <= budget < spent(beyond)
