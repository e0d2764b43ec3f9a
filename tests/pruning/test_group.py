"""The group update against dense algebra: the exact minimiser on the kept weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from fishleg_jax._conjugate_gradients import conjugate_gradients
from fishleg_jax.pruning.compensation import _group_system
from tests import dense

DAMPING = 0.03
MODEL = flj.Model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], flj.likelihoods.categorical())
MFAC = {
    size: flj.inverse.mfac(MODEL, DAMPING, window=11, block_size=size) for size in (None, "leaf")
}


def quadratic(fisher, gradient, params):
    """A curvature that is a quadratic around `params`, of dense matrices."""
    flat, unravel = ravel_pytree(params)

    def loss(p):
        delta = ravel_pytree(p)[0] - flat
        return gradient @ delta + delta @ fisher @ delta / 2

    return flj.Curvature(
        loss=loss,
        gradient=lambda p: unravel(gradient + fisher @ (ravel_pytree(p)[0] - flat)),
        product=lambda p, v: unravel(fisher @ ravel_pytree(v)[0]),
    )


def problem(seed, size=9):
    """Weights (a matrix and a vector), a Fisher, a gradient, and masks before and after."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size + 2))
    w = rng.normal(size=size)
    old = rng.random(size) < 0.8
    new = old & (rng.random(size) < 0.6)
    tree = lambda x: {"a": jnp.asarray(x[:6]).reshape(2, 3), "b": jnp.asarray(x[6:])}
    fisher = jnp.asarray(root @ root.T / root.shape[1])
    return tree(w * old), fisher, jnp.asarray(rng.normal(size=size)), tree(old), tree(new)


def dense_inverse(fisher, damping=DAMPING):
    """The damped inverse: the state of `dense.STATED`, which cuts it to a mask."""
    return jnp.linalg.inv(fisher + damping * jnp.eye(len(fisher)))


def compensated(group, seed):
    """What a compensation makes of a problem, with the exact inverse."""
    params, fisher, gradient, old, new = problem(seed)
    curvature = quadratic(fisher, gradient, params)
    return group(params, old, new, curvature, dense.STATED, dense_inverse(fisher))


def solved(seed, *, first_order=False, **options):
    group = flj.compensation.group(
        damping=DAMPING, first_order=first_order, check_step=False, **options
    )
    return *problem(seed), *compensated(group, seed)


@pytest.mark.parametrize("first_order", [False, True], ids=["zero gradient", "gradient"])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_minimiser_on_the_kept_weights(x64, seed, first_order):
    params, fisher, gradient, _, new, delta, info = solved(
        seed, first_order=first_order, iterations=50, tolerance=1e-12
    )
    w, g, kept = dense.ravel(params), np.asarray(gradient), dense.ravel(new).astype(bool)
    damped = np.asarray(fisher) + DAMPING * np.eye(len(w))
    right = damped[np.ix_(kept, ~kept)] @ w[~kept] - first_order * g[kept]
    expected = -w
    expected[kept] = np.linalg.solve(damped[np.ix_(kept, kept)], right)
    np.testing.assert_allclose(dense.ravel(delta), expected, atol=1e-9)
    assert info["residual"] < 1e-9
    predicted = g @ expected + expected @ np.asarray(fisher) @ expected / 2
    assert info["predicted"] == pytest.approx(predicted, rel=1e-8)
    assert info["actual"] == pytest.approx(predicted, rel=1e-8)  # the loss is this quadratic
    assert info["ratio"] < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_the_quadratic_cost_is_never_above_that_of_independent(seed, iterations, first_order):
    with jax.enable_x64(True):
        params, fisher, gradient, old, new, delta, _ = solved(
            seed, first_order=first_order, iterations=iterations, tolerance=0.0
        )
        curvature = quadratic(fisher, gradient, params)
        single, _ = flj.compensation.independent(first_order=first_order, check_step=False)(
            params, old, new, curvature, dense.STATED, dense_inverse(fisher)
        )

        def cost(d):
            d = dense.ravel(d)
            damped = np.asarray(fisher) + DAMPING * np.eye(len(d))
            return first_order * np.asarray(gradient) @ d + d @ damped @ d / 2

        assert cost(delta) <= cost(single) + 1e-9 * abs(cost(single))
        gone = ~dense.ravel(new).astype(bool)
        assert np.all(dense.ravel(params)[gone] == -dense.ravel(delta)[gone])


def test_of_one_weight_it_is_optimal_brain_surgeon(x64):
    """`δ = −(w_q / [F⁻¹]_qq) F⁻¹ e_q`, Hassibi and Stork's equation 5."""
    params, fisher, gradient, *_ = problem(3)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.ones_like, params))
    old = unravel(flat > 0)
    new = unravel((flat > 0).at[4].set(False))
    params = unravel(jnp.arange(1.0, 10.0))
    curvature = quadratic(fisher, gradient, params)
    group = flj.compensation.group(damping=DAMPING, check_step=False, tolerance=1e-12)
    delta, info = group(params, old, new, curvature, dense.STATED, dense_inverse(fisher))
    inverse = np.linalg.inv(np.asarray(fisher) + DAMPING * np.eye(9))
    np.testing.assert_allclose(dense.ravel(delta), -5.0 / inverse[4, 4] * inverse[:, 4], atol=1e-9)
    assert info["iterations"] == 0  # where it starts, `independent`, is this already


def test_a_diagonal_fisher_changes_no_kept_weight(x64):
    params, _, gradient, old, new = problem(5)
    fisher = jnp.diag(jnp.arange(1.0, 10.0))
    curvature = quadratic(fisher, gradient, params)
    group = flj.compensation.group(damping=DAMPING, check_step=False)
    delta, _ = group(params, old, new, curvature, dense.STATED, dense_inverse(fisher))
    expected = np.where(dense.ravel(new), 0, -dense.ravel(params))
    np.testing.assert_array_equal(dense.ravel(delta), expected)


def test_what_starts_badly_still_arrives(x64):
    """A preconditioner and a start that have nothing to do with the Fisher cost iterations only."""
    params, fisher, gradient, old, new = problem(6)
    _, other, *_ = problem(7)
    curvature = quadratic(fisher, gradient, params)
    group = flj.compensation.group(
        damping=DAMPING, check_step=False, tolerance=1e-11, iterations=60
    )
    exact, few = group(params, old, new, curvature, dense.STATED, dense_inverse(fisher))
    wrong, many = group(params, old, new, curvature, dense.STATED, dense_inverse(other))
    np.testing.assert_allclose(dense.ravel(wrong), dense.ravel(exact), atol=1e-7)
    assert few["iterations"] <= many["iterations"]


def test_a_long_step_raises_the_damping(x64):
    """Where the loss is no quadratic and all of the step is too much, a shorter one is taken."""
    params, fisher, gradient, old, new = problem(8)
    model = quadratic(fisher, gradient, params)
    flat = ravel_pytree(params)[0]
    kept = jnp.asarray(dense.ravel(new))

    def loss(p):
        delta = (ravel_pytree(p)[0] - flat) * kept
        return model.loss(p) + 1.5 * jnp.sum(delta**2)

    group = flj.compensation.group(damping=DAMPING, attempts=3)
    delta, info = group(
        params, old, new, model._replace(loss=loss), dense.STATED, dense_inverse(fisher)
    )
    assert info["damping"] > 2 * DAMPING
    assert min(info["losses"]) == pytest.approx(
        float(loss(jax.tree.map(jnp.add, params, delta))), rel=1e-12
    )


def test_a_singular_fisher_and_one_that_is_no_number(x64):
    params, fisher, gradient, old, new = problem(9)
    group = flj.compensation.group(damping=1e-12, check_step=False)
    singular = jnp.outer(gradient, gradient)
    curvature = quadratic(singular, gradient, params)
    delta, _ = group(params, old, new, curvature, dense.STATED, dense_inverse(singular, 1e-2))
    assert np.isfinite(dense.ravel(delta)).all()
    broken = quadratic(fisher * jnp.nan, gradient, params)
    checked = flj.compensation.group(damping=DAMPING)
    delta, info = checked(
        params,
        old,
        new,
        curvature._replace(product=broken.product),
        dense.STATED,
        dense_inverse(fisher),
    )
    assert info["iterations"] == 0
    assert np.isfinite(dense.ravel(delta)).all()


def test_the_solver_under_jit_is_that_on_the_host(x64):
    _, fisher, gradient, *_ = problem(10)

    def precondition(scale, r):
        return scale * r

    def solve(b):
        return conjugate_gradients(
            lambda v: fisher @ v + v,
            precondition,
            (2.0,),
            b,
            jnp.zeros_like(b),
            iterations=7,
            tolerance=1e-6,
        )

    host, compiled = solve(gradient), jax.jit(solve)(gradient)
    np.testing.assert_allclose(host.x, compiled.x, rtol=1e-10)
    assert int(host.iterations) == int(compiled.iterations) > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"damping": 0.0}, "damping must be a positive finite number or None, got 0.0"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"attempts": 0}, "attempts must be a whole number of at least 1, got 0"),
        ({"tolerance": 1.0}, "tolerance must be in \\[0, 1\\), got 1.0"),
        ({"damping": "a"}, "damping must be a positive finite number or None, got 'a'"),
        ({"damping": True}, "damping must be a positive finite number or None, got True"),
        ({"tolerance": None}, "tolerance must be in \\[0, 1\\), got None"),
        ({"iterations": True}, "iterations must be a whole number of at least 1, got True"),
        ({"iterations": 2.0}, "iterations must be a whole number of at least 1, got 2.0"),
        ({"check_step": "no"}, "check_step must be True or False, got 'no'"),
        ({"first_order": "yes"}, "first_order must be True or False, got 'yes'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        flj.compensation.group(**options)


def test_numbers_of_numpy_and_jax_are_numbers(x64):
    arguments = {"damping": DAMPING, "iterations": 3, "attempts": 1, "tolerance": 1e-3}
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    numbers = {name: np.asarray(value)[()] for name, value in arguments.items()}
    first, *others = (
        compensated(flj.compensation.group(**given), seed=1)[0]
        for given in (arguments, arrays, numbers)
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_without_labels_it_solves_the_same_system():
    """The exact Fisher needs none, and neither does a gradient that takes no part."""
    keys = jax.random.split(jax.random.key(4), 4)
    params = {"a": jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5, 3))}
    batch = jax.random.normal(keys[2], (11, 4)), jax.random.randint(keys[3], (11,), 0, 3)
    identity = flj.inverse.identity()

    def prune(targets, **options):
        group = flj.compensation.group(damping=DAMPING, **options)
        return flj.prune_one_shot(
            MODEL, params, identity, [(batch[0], targets)], sparsity=0.5, compensation=group
        )

    with_labels, without = (prune(y, check_step=False) for y in (batch[1], None))
    jax.tree.map(np.testing.assert_array_equal, with_labels.params, without.params)
    (told,) = without.stages
    assert np.isnan(told["ratio"]) and "actual" not in told
    assert told["predicted"] == pytest.approx(without.report.total.predicted)  # that of the scores
    for options in ({}, {"check_step": False, "first_order": True}):
        with pytest.raises(
            ValueError, match="batches must have labels for (check_step|first_order)"
        ):
            prune(None, **options)


def test_what_it_needs_of_an_estimate_is_asked_before_the_fit():
    estimator = flj.inverse.identity()._replace(update=None, updates=1)
    batches = [(jnp.ones((2, 3)), None)]
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    group = flj.compensation.group(check_step=False, damping=0.1, fisher="estimate")
    with pytest.raises(ValueError, match="an estimate with its gradients in memory"):
        flj.prune_one_shot(
            model, jnp.ones((3, 2)), estimator, batches, sparsity=0.5, compensation=group
        )


def test_the_first_damping_does_not_depend_on_the_estimate(x64):
    """It is a fifth of the Fisher's mean diagonal, exactly so for a diagonal Fisher."""
    diagonal = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.array([0.5, 2.0])}
    params = jax.tree.map(jnp.ones_like, diagonal)
    kept = {"a": jnp.array([[True, False, True], [True, True, False]]), "b": jnp.array([True] * 2)}
    signs = _group_system.random_signs(params, kept)
    image = jax.tree.map(jnp.multiply, diagonal, signs)
    found = _group_system.mean_diagonal(signs, image, kept)
    w, k = dense.ravel(diagonal), dense.ravel(kept).astype(bool)
    assert float(found) == pytest.approx(w[k].mean(), rel=1e-12)
    assert set(np.abs(dense.ravel(signs))[k]) == {1.0} and not dense.ravel(signs)[~k].any()


@pytest.mark.parametrize("name", [pytest.param("kfac", marks=pytest.mark.slow), "diagonal"])
def test_a_solve_ends_where_the_held_out_loss_does(key, name):
    """Its loss is the lowest of those noted, and never above that of the corrections."""
    params = dense.mlp_params(key, (3, 12, 3))
    batches = [dense.classification_batch(k, 24) for k in jax.random.split(key, 3)]
    model = dense.categorical_mlp()
    estimator = getattr(flj.inverse, name)(model)
    state = flj.fit(estimator, params, batches[:2], key=key)
    losses = []

    def check(weights):
        losses.append(float(flj.loss(model, weights, batches[2])))
        return losses[-1]

    curvature = flj.curvature(model, batches[:2])._replace(check=check)
    old = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    new = flj.make_masks(jax.tree.map(jnp.abs, params), 0.6)
    group = flj.compensation.group(damping=1e-4, iterations=12, tolerance=1e-9)
    delta, info = group(params, old, new, curvature, estimator, state)
    looks = losses[: losses.index(min(losses)) + 1]
    assert info["losses"][0] <= looks[0] + 1e-6
    found = float(flj.loss(model, jax.tree.map(jnp.add, params, delta), batches[2]))
    assert found == pytest.approx(min(info["losses"]), rel=1e-6)
    assert info["products"] >= info["iterations"]


def test_work_is_stated_beforehand_and_limited(key, caplog):
    params = dense.mlp_params(key, (3, 12, 3))
    batches = [dense.classification_batch(key, 24)]
    model = dense.categorical_mlp()
    estimator = flj.inverse.diagonal(model)
    state = flj.fit(estimator, params, batches, key=key)
    old = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    new = flj.make_masks(jax.tree.map(jnp.abs, params), 0.6)
    arguments = (params, old, new, flj.curvature(model, batches), estimator, state)
    with caplog.at_level("INFO", logger="fishleg_jax"):
        _, free = flj.compensation.group(tolerance=1e-9)(*arguments)
        _, limited = flj.compensation.group(tolerance=1e-9, seconds=1e-9)(*arguments)
    assert "at most 81 Fisher products, about" in caplog.text  # 3 attempts of 25, and two each
    assert 25 < free["products"] <= 81 + 2  # the right side and the damping come before
    assert limited["iterations"] == 0
    with pytest.raises(ValueError, match="seconds must be"):
        flj.compensation.group(seconds=0)


@pytest.mark.parametrize(
    "block_size, first_order",
    [(None, True), ("leaf", False)],
    ids=["None-gradient", "leaf-zero gradient"],
)
def test_the_estimates_own_gradients_are_solved_without_iterations(x64, block_size, first_order):
    keys = jax.random.split(jax.random.key(3), 5)
    params = {"a": jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5, 3))}
    batch = jax.random.normal(keys[2], (11, 4)), jax.random.randint(keys[3], (11,), 0, 3)
    estimator = MFAC[block_size]
    state = flj.fit(estimator, params, [batch], key=keys[4])
    old = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    new = flj.make_masks(jax.tree.map(jnp.abs, params), 0.4)
    group = flj.compensation.group(first_order=first_order, check_step=False, fisher="estimate")
    delta, info = group(params, old, new, flj.curvature(MODEL, [batch]), estimator, state)

    flat = dense.gradients(MODEL, params, batch)
    fisher = flat.T @ flat / 11
    if block_size == "leaf":
        fisher[:20, 20:] = fisher[20:, :20] = 0
    w, kept = dense.ravel(params), dense.ravel(new).astype(bool)
    damped = fisher + DAMPING * np.eye(len(w))
    gradient = flat.mean(axis=0)
    right = damped[np.ix_(kept, ~kept)] @ w[~kept] - first_order * gradient[kept]
    expected = -w
    expected[kept] = np.linalg.solve(damped[np.ix_(kept, kept)], right)
    np.testing.assert_allclose(dense.ravel(delta), expected, atol=1e-10)
    assert info["iterations"] == 0 and info["residual"] < 1e-10
    predicted = gradient @ expected + expected @ fisher @ expected / 2
    assert info["predicted"] == pytest.approx(predicted, rel=1e-8)


def test_an_estimate_without_gradients_has_no_system_of_its_own():
    group = flj.compensation.group(damping=DAMPING, fisher="estimate")
    with pytest.raises(ValueError, match="an estimate with its gradients in memory"):
        compensated(group, seed=0)
    with pytest.raises(ValueError, match="fisher must be one of exact, estimate, got 'window'"):
        flj.compensation.group(fisher="window")


@pytest.mark.parametrize("factor", [-3.0, 0.0, 1.0, 100.0])
def test_a_solve_starts_at_the_best_multiple_of_what_it_is_given(x64, factor):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 8))
    matrix, right, x = (
        jnp.asarray(root @ root.T),
        jnp.asarray(rng.normal(size=6)),
        rng.normal(size=6),
    )
    solve = conjugate_gradients(
        lambda v: matrix @ v,
        lambda r: r,
        (),
        right,
        jnp.asarray(factor * x),
        iterations=0,
        tolerance=0.0,
    )
    best = (x @ right) / (x @ matrix @ x) if factor else 0.0
    np.testing.assert_allclose(solve.x, best * x, rtol=1e-10)
    np.testing.assert_allclose(solve.residual, right - matrix @ solve.x, rtol=1e-9)
