"""Selections within a pruning: the border, the other pruned weights, stages, scopes and costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning.selection._border import find_border
from fishleg_jax.pruning.selection._conditional import conditional
from tests import dense
from tests.pruning.test_group import quadratic

DAMPING = 0.03
SIZES = {"a": (4, 5), "b": (3, 4), "bias": (3,)}  # of which the vector is not prunable
SWAPS = flj.selection.swaps(iterations=100, tolerance=1e-13)
ESTIMATOR = dense.STATED
MODEL = dense.categorical_mlp()
WOODFISHER = flj.inverse.woodfisher(MODEL, gradients=24)
LINEAR = flj.Model(lambda p, x: (x @ p["in"]) @ p["out"], flj.likelihoods.gaussian())


def tree_of(vector):
    leaves, at = {}, 0
    for name, shape in SIZES.items():
        size = int(np.prod(shape))
        leaves[name] = jnp.asarray(vector[at : at + size]).reshape(shape)
        at += size
    return leaves


def problem(seed, rows=20):
    """Weights, the damped Fisher and its inverse, and a curvature."""
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(rows, 35)) @ rng.normal(size=(35, 35)) / 6
    fisher = jacobian.T @ jacobian / rows
    params = tree_of(rng.normal(size=35))
    damped = fisher + DAMPING * np.eye(35)
    curvature = quadratic(jnp.asarray(fisher), jnp.zeros(35), params)
    return params, damped, jnp.linalg.inv(damped), curvature


def everything(params):
    return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


def obs(params, inverse, sparsity, scope="global", costs=None):
    scores = flj.obs_saliency(params, ESTIMATOR.diagonal(inverse, params))
    scores = scores if costs is None else jax.tree.map(jnp.divide, scores, costs)
    masks = flj.make_masks(scores, sparsity, scope=scope)
    return scores | {"bias": jnp.full(3, jnp.inf)}, masks


def compensated(params, inverse, masks):
    gone = ~dense.ravel(masks).astype(bool)
    return float(flj.selection.compensated_cost(dense.ravel(params), inverse, gone))


def uncompensated(params, damped, masks):
    gone = np.where(dense.ravel(masks), 0, dense.ravel(params))
    return gone @ damped @ gone / 2


def selected(selection, seed, sparsity=0.6, scope="global"):
    params, damped, inverse, curvature = problem(seed)
    scores, masks = obs(params, inverse, sparsity, scope)
    old = everything(params)
    found = selection(params, old, masks, scores, curvature, ESTIMATOR, inverse, scope)
    return params, damped, inverse, masks, found


def number(masks):
    return {name: int(jnp.sum(~m)) for name, m in masks.items()}


def test_the_border_is_nearest_to_the_threshold():
    scores = {"a": jnp.array([[1.0, 5.0, 3.0, 9.0]]), "b": jnp.array([[2.0, 7.0, 4.0]])}
    old = {"a": jnp.array([[True, True, True, True]]), "b": jnp.array([[True, True, True]])}
    new = jax.tree.map(lambda s: s > 3.5, scores)
    edge = find_border(old, new, scores, 2, "global")
    found = {(int(i), int(p), bool(x)) for i, p, x in zip(*edge, strict=True)}
    assert found == {(1, 2, False), (0, 1, False), (0, 2, True), (1, 0, True)}
    # pruned before is on neither side, and a leaf that loses nothing has nothing to swap
    old["b"] = new["b"] = jnp.array([[False, True, True]])
    edge = find_border(old, new, scores, 2, "layer")
    found = {(int(i), int(p), bool(x)) for i, p, x in zip(*edge, strict=True)}
    assert found == {(0, 1, False), (0, 3, False), (0, 2, True), (0, 0, True)}


def test_conditioning_on_the_others_is_the_inverse_of_what_is_left(x64):
    params, damped, inverse, _ = problem(0)
    flat = np.arange(35) % 3
    gone, border = flat == 0, np.flatnonzero(flat == 1)[:6]
    leaves = (border >= 20).astype(np.int32) + (border >= 32)
    places = border - np.array([0, 20, 32])[leaves]
    weights, matrix = jax.jit(conditional, static_argnums=(0, 1))(
        ESTIMATOR, 4, inverse, params, everything(params), tree_of(gone), leaves, places, 200, 1e-14
    )
    left = np.flatnonzero(~gone)
    cut = np.linalg.inv(damped[np.ix_(left, left)])
    at = np.searchsorted(left, border)
    np.testing.assert_allclose(matrix, cut[np.ix_(at, at)], rtol=1e-9, atol=1e-9)
    w = dense.ravel(params)
    moved = w[left] + cut @ damped[np.ix_(left, gone)] @ w[gone]
    np.testing.assert_allclose(weights, moved[at], rtol=1e-9)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("border", [6, 64])
def test_swaps_lower_the_compensated_cost_of_the_whole_set(x64, border, scope):
    selection = flj.selection.swaps(border=border, iterations=200, tolerance=1e-13)
    ratios = []
    for seed in range(6):
        params, _, inverse, masks, found = selected(selection, seed, scope=scope)
        before, after = (compensated(params, inverse, m) for m in (masks, found))
        moved = any(bool(jnp.any(masks[k] != found[k])) for k in masks)
        assert after < before if moved else after == before
        assert bool(jnp.all(found["bias"]))
        totals = [number(m) for m in (masks, found)]
        assert sum(totals[0].values()) == sum(totals[1].values())
        assert scope == "global" or totals[0] == totals[1]
        ratios.append(after / before)
    print(f"{scope}, border {border}: median ratio {np.median(ratios):.3f}")
    assert min(ratios) < 0.95


@pytest.mark.parametrize("solver", ["swaps", "annealing"])
def test_a_qubo_lowers_the_cost_without_compensation(x64, solver):
    ratios = []
    for seed in range(4):
        params, damped, _, masks, found = selected(
            flj.selection.qubo(border=16, solver=solver, damping=DAMPING, reads=8), seed
        )
        before, after = (uncompensated(params, damped, m) for m in (masks, found))
        assert after <= before * (1 + 1e-12)
        assert sum(number(masks).values()) == sum(number(found).values())
        ratios.append(after / before)
    assert min(ratios) < 0.9


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_one_shot_with_the_group_update(x64, scope):
    """With the exact inverse the loss after the group update is the compensated cost."""
    inputs = jax.random.normal(jax.random.key(1), (60, 8)) @ jax.random.normal(
        jax.random.key(2), (8, 8)
    )
    params = {"in": jax.random.normal(jax.random.key(3), (8, 6)), "out": jnp.eye(6)}
    batch = (inputs, LINEAR.predict(params, inputs))
    matrix = dense.exact_fisher(LINEAR, params, batch, lambda o: np.eye(6)) + DAMPING * np.eye(84)
    inverse = jnp.asarray(np.linalg.inv(matrix))

    def run(selection):
        result = flj.prune_one_shot(
            LINEAR,
            params,
            ESTIMATOR,
            [batch],
            sparsity=0.6,
            scope=scope,
            selection=selection,
            masks=None,
            compensation=flj.compensation.group(
                damping=DAMPING, iterations=300, tolerance=1e-12, check_step=False
            ),
            stages=flj.Stages(state=inverse),
        )
        moved = dense.ravel(result.params) - dense.ravel(params)
        return result, moved @ matrix @ moved / 2

    plain, before = run(None)
    better, after = run(SWAPS)
    print(f"{scope}: {before:.4f} to {after:.4f}")
    assert after < 0.95 * before
    assert after == pytest.approx(compensated(params, inverse, better.masks), rel=1e-6)
    assert (
        sum(number(plain.masks).values())
        == sum(number(better.masks).values())
        == 50 - (scope == "layer")
    )
    if scope == "layer":
        assert number(plain.masks) == number(better.masks)
    assert bool(jnp.all((better.params["in"] == 0) == ~better.masks["in"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "selection",
    [flj.selection.swaps(border=8), flj.selection.qubo(border=8)],
    ids=["swaps", "qubo"],
)
def test_stages_with_a_fitted_inverse_are_exact_and_monotone(key, selection):
    params = dense.mlp_params(key, (3, 8, 3))
    batches = [dense.classification_batch(key, 24)]
    result = flj.prune_one_shot(
        MODEL,
        params,
        WOODFISHER,
        batches,
        sparsity=0.7,
        stages=2,
        compensation=flj.compensation.group(),
        selection=selection,
    )
    assert flj.sparsity(result.params) == pytest.approx(33 / 48)
    # what is pruned stays pruned, with any selection
    state = flj.fit(WOODFISHER, params, batches, key=key)
    scores = flj.obs_saliency(params, dense.jitted(WOODFISHER.diagonal)(state, params))
    old = flj.make_masks(scores, 0.3)
    new = flj.make_masks(scores, 0.6, masks=old)
    barred = jax.tree.map(lambda s: s if s.ndim > 1 else jnp.full(s.shape, jnp.inf), scores)
    curvature = flj.curvature(MODEL, batches)
    found = selection(params, old, new, barred, curvature, WOODFISHER, state, "global")
    kept = dense.ravel(found).astype(bool)
    assert not np.any(kept & ~dense.ravel(old).astype(bool))
    assert kept.sum() == dense.ravel(new).sum()


def test_a_diagonal_inverse_keeps_the_mask_of_the_scores_with_any_costs(x64):
    params, *_, curvature = problem(3)
    inverse = jnp.diag(jnp.linspace(1.0, 2.0, 35))
    costs = tree_of(1 + np.arange(35.0) % 4)
    for given in (None, costs):
        scores, masks = obs(params, inverse, 0.5, costs=given)
        found = SWAPS(params, everything(params), masks, scores, curvature, ESTIMATOR, inverse)
        np.testing.assert_array_equal(dense.ravel(found), dense.ravel(masks))


def test_the_order_of_the_leaves_changes_nothing(x64):
    params, damped, _, masks, found = selected(SWAPS, 1)
    assert np.any(dense.ravel(masks) != dense.ravel(found))
    order = np.concatenate([np.arange(20, 35), np.arange(20)])  # a behind b and bias
    rename = lambda tree: {"b": tree["b"], "bias": tree["bias"], "z": tree["a"]}
    inverse = jnp.linalg.inv(damped[np.ix_(order, order)])
    other = rename(params)
    scores, new = obs(other, inverse, 0.6)
    again = SWAPS(other, everything(other), new, scores, None, ESTIMATOR, inverse)
    for one, two in zip(jax.tree.leaves(rename(found)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_gradient_moves_the_target(x64):
    """With first-order scores the cost is that of `t = w − F⁻¹g`."""
    params, damped, inverse, _ = problem(2)
    gradient = 0.3 * np.random.default_rng(0).normal(size=35)
    curvature = quadratic(jnp.asarray(damped), jnp.asarray(gradient), params)
    target = tree_of(dense.ravel(params) - inverse @ gradient)
    scores, masks = obs(target, inverse, 0.6)
    select = flj.selection.swaps(iterations=100, tolerance=1e-13)
    found = select(
        params, everything(params), masks, scores, curvature, ESTIMATOR, inverse, first_order=True
    )
    assert compensated(target, inverse, found) < compensated(target, inverse, masks)


def test_nothing_to_swap_is_left_alone():
    params, _, inverse, curvature = problem(4)
    scores, masks = obs(params, inverse, 0.0)
    found = SWAPS(params, everything(params), masks, scores, curvature, ESTIMATOR, inverse)
    np.testing.assert_array_equal(dense.ravel(found), dense.ravel(masks))


@pytest.mark.parametrize(
    "selection, options, message",
    [
        (flj.selection.swaps(), {"first_order": True}, "curvature is needed for the gradient"),
        (flj.selection.qubo(), {}, "curvature is needed for the Fisher products of a QUBO"),
    ],
    ids=["swaps", "qubo"],
)
def test_a_curvature_that_is_needed_and_missing(selection, options, message):
    with pytest.raises(ValueError, match=message):
        selection(*[None] * 7, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m | {"b": jnp.ones((3, 4), bool)}, "as many weights as the scores do"),
        (lambda m: m | {"bias": jnp.zeros(3, bool)}, "must not prune what is not prunable"),
        (lambda m: {"a": m["a"]}, "selection must have the structure"),
    ],
)
def test_a_selection_of_ones_own_is_checked(change, message):
    model = flj.Model(lambda p, x: x @ p["a"], flj.likelihoods.gaussian())
    params = tree_of(np.random.default_rng(0).normal(size=35).astype(np.float32))
    with pytest.raises(ValueError, match=message):
        flj.prune_one_shot(
            model,
            params,
            flj.inverse.identity(),
            [(jnp.ones((2, 4)), None)],
            sparsity=0.6,
            selection=lambda params, old, new, *rest: change(new),
        )


def test_selections_hear_of_the_gradient_if_they_ask():
    """One with a keyword `first_order` is given it; one without keeps its eight arguments."""
    params = {"in": jax.random.normal(jax.random.key(3), (8, 6)), "out": jnp.eye(6)}
    batch = (jnp.ones((4, 8)), jnp.ones((4, 6)))
    heard = []

    def asking(params, old, new, scores, curvature, estimator, state, scope, first_order=False):
        heard.append(first_order)
        return new

    def silent(params, old, new, scores, curvature, estimator, state, scope):
        heard.append(None)
        return new

    for selection in (asking, silent):
        for first_order in (False, True):
            compensation = flj.compensation.independent(first_order=first_order, check_step=False)
            flj.prune_one_shot(
                *(LINEAR, params, flj.inverse.identity(), [batch]),
                sparsity=0.5,
                selection=selection,
                compensation=compensation,
            )
    assert heard == [False, True, None, None]
