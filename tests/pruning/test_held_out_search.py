"""The solve of the group update that held-out examples judge, against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from fishleg_jax.pruning.compensation import _held_out_search
from fishleg_jax.pruning.compensation._subspace import Subspace
from tests import dense
from tests.pruning.test_group import DAMPING, problem, quadratic


def small_system(seed, vectors, size=12):
    """A Fisher, a right side, and a few vectors."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size // 2))  # of half the rank: the damping counts
    return root @ root.T, rng.normal(size=size), rng.normal(size=(vectors, size))


def space_of(fisher, right, vectors, damping):
    tree = lambda x: {"a": jnp.asarray(x[:4]).reshape(2, 2), "b": jnp.asarray(x[4:])}
    space = Subspace(tree(right), damping)
    for v in vectors:
        space.add(tree(v), tree(fisher @ v + damping * v))
    return space


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-3, 3))
def test_solutions_are_lowest_points_in_the_space_at_any_damping(seed, number, exponent):
    with jax.enable_x64(True):
        fisher, right, vectors = small_system(seed, number)
        coefficients, gain = space_of(fisher, right, vectors, 0.1).solver()(0.1 * 4.0**exponent)
        damped = fisher + 0.1 * 4.0**exponent * np.eye(len(right))
        expected = np.linalg.solve(vectors @ damped @ vectors.T, vectors @ right)
        x, y = vectors.T @ coefficients, vectors.T @ expected
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * np.abs(y).max())
        assert gain == pytest.approx(right @ y / 2, rel=1e-7)


def test_a_vector_that_adds_nothing_changes_nothing(x64):
    fisher, right, vectors = small_system(0, 3)
    more = [*vectors, 2 * vectors[0] - vectors[2], np.zeros(12), np.full(12, np.nan)]
    found = []
    for each in (vectors, more):
        space = space_of(fisher, right, each, 0.1)
        found.append(dense.ravel(space.combined(space.solver()(0.02)[0])))
    np.testing.assert_allclose(*found, rtol=1e-8)
    assert len(space.vectors) == 4  # without the vectors of zeros and of NaN
    empty = space_of(fisher, right, [], 0.1)
    assert not dense.ravel(empty.combined(empty.solver()(1.0)[0])).any()


def test_in_float32_small_dampings_stay_accurate():
    """The directions of one solve, with rounding errors, are good for a 64th of its damping."""
    fisher, right, _ = small_system(1, 0, size=40)
    fisher = fisher * np.outer(*[np.logspace(0, -2, 40)] * 2)  # an ill-conditioned one
    space, residual = Subspace(jnp.asarray(right, jnp.float32), 0.1), right
    vectors = []
    for _ in range(25):  # from gradients, which are far from conjugate
        v = np.float32(residual / np.linalg.norm(residual))
        vectors.append(v)
        space.add(jnp.asarray(v), jnp.asarray(fisher @ v + 0.1 * v, jnp.float32))
        x = np.asarray(space.combined(space.solver()(0.1)[0]), np.float64)
        residual = right - fisher @ x - 0.1 * x
    basis = np.linalg.qr(np.array(vectors, np.float64).T)[0]
    for damping in (0.1, 0.1 / 4, 0.1 / 64, 10.0):
        damped = fisher + damping * np.eye(40)
        best = basis @ np.linalg.solve(basis.T @ damped @ basis, basis.T @ right)
        x = np.asarray(space.combined(space.solver()(damping)[0]), np.float64)
        gain = lambda z, damped=damped: right @ z - z @ damped @ z / 2
        assert gain(x) >= (1 - 1e-3) * gain(best)


def held_out_of(seed, damping):
    """A held-out loss that is lowest at the exact change of kept weights at a damping."""
    params, fisher, gradient, _, new = problem(seed)
    kept = dense.ravel(new).astype(bool)
    w, flat = dense.ravel(params), ravel_pytree(params)[0]
    damped = np.asarray(fisher) + damping * np.eye(len(w))
    best = -w
    best[kept] = np.linalg.solve(damped[np.ix_(kept, kept)], damped[np.ix_(kept, ~kept)] @ w[~kept])
    loss = lambda p: jnp.sum((ravel_pytree(p)[0] - flat - best) ** 2)
    return best, quadratic(fisher, gradient, params)._replace(check=loss)


def judged(seed, curvature, monkeypatch, first, **options):
    """The change and the numbers of a group update whose search begins at a damping.

    Preconditioned by nothing: with the exact inverse a solve at one damping ends too soon to hold
    the solutions at others.
    """
    params, _, _, old, new = problem(seed)
    monkeypatch.setattr(flj.pruning.compensation._group_solve, "HELD_OUT_DAMPING", 1.0)
    monkeypatch.setattr(
        flj.pruning.compensation._group_solve, "mean_diagonal", lambda *_: jnp.asarray(first)
    )
    group = flj.compensation.group(iterations=20, tolerance=1e-14, **options)
    return group(params, old, new, curvature, flj.inverse.identity(), ())


@pytest.mark.parametrize("power", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_damping_of_the_lowest_held_out_loss(x64, monkeypatch, seed, power):
    """Without a margin, as the loss here has another unit than the quadratic model."""
    monkeypatch.setattr(_held_out_search, "SHORT", 0.0)
    monkeypatch.setattr(_held_out_search, "PATIENCE", 9)
    best, curvature = held_out_of(seed, DAMPING * 4.0**power)
    delta, info = judged(seed, curvature, monkeypatch, DAMPING, attempts=9)
    assert info["damping"] == pytest.approx(DAMPING * 4.0**power, rel=1e-12)
    np.testing.assert_allclose(dense.ravel(delta), best, atol=1e-8)
    assert info["residual"] < 1e-8 and info["step"] == 1.0
    image = np.asarray(problem(seed)[1]) @ best
    assert info["predicted"] == pytest.approx(problem(seed)[2] @ best + best @ image / 2)


def test_all_dampings_take_the_products_of_one_solve(x64, monkeypatch):
    monkeypatch.setattr(_held_out_search, "SHORT", 0.0)
    _, curvature = held_out_of(0, DAMPING / 16)
    made = []
    counted = lambda p, v: made.append(v) or problem_product(p, v)
    problem_product = curvature.product
    curvature = curvature._replace(product=counted)
    found = [judged(0, curvature, monkeypatch, DAMPING, attempts=n)[1] for n in (1, 9)]
    assert found[0]["damping"] > found[1]["damping"]
    iterations = 9  # the kept weights, at most
    for info in found:  # those of pruning, the mean diagonal, the start, and of the solution
        assert info["products"] <= iterations + 4
    assert len(made) == sum(info["products"] for info in found)


def test_a_given_damping_stays(x64, monkeypatch):
    monkeypatch.setattr(_held_out_search, "PATIENCE", 9)
    monkeypatch.setattr(_held_out_search, "SHORT", 0.0)
    _, curvature = held_out_of(0, DAMPING / 16)  # which would prefer another
    delta, info = judged(0, curvature, monkeypatch, 1.0, damping=DAMPING)
    assert info["damping"] == DAMPING
    np.testing.assert_allclose(dense.ravel(delta), held_out_of(0, DAMPING)[0], atol=1e-8)


def test_a_damping_does_not_win_by_less_than_a_tenth_of_the_predicted_gain(x64, monkeypatch):
    _, curvature = held_out_of(0, DAMPING / 16)
    check = curvature.check
    weak = curvature._replace(check=lambda p: 1e-6 * check(p))
    assert judged(0, weak, monkeypatch, DAMPING)[1]["damping"] == DAMPING
    strong = curvature._replace(check=lambda p: 1e6 * check(p))
    assert judged(0, strong, monkeypatch, DAMPING)[1]["damping"] < DAMPING


def test_where_no_loss_is_finite_no_kept_weight_moves(x64, monkeypatch):
    params, *_, new = problem(0)
    _, curvature = held_out_of(0, DAMPING)
    flat = ravel_pytree(params)[0]
    moved = lambda p: jnp.any(jnp.where(ravel_pytree(new)[0], ravel_pytree(p)[0] - flat, 0) != 0)
    lost = curvature._replace(check=lambda p: jnp.where(moved(p), jnp.nan, 1.0))
    delta, info = judged(0, lost, monkeypatch, DAMPING)
    assert info["held_out"] == 0.0
    assert not dense.ravel(delta)[dense.ravel(new).astype(bool)].any()
