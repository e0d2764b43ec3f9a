"""Units scored by their own blocks of the inverse Fisher, chosen for their cost, compensated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests import dense
from tests.compaction import networks

X = jax.random.normal(jax.random.key(0), (40, 5)) @ (jnp.eye(5) + 0.8)  # correlated
PARAMS = networks.mlp_params((5, 8, 6, 3))
MODEL = flj.Model(networks.mlp, flj.likelihoods.gaussian())
BATCHES = [(X, networks.mlp(PARAMS, X) + 0.1 * jax.random.normal(jax.random.key(1), (40, 3)))]
COUPLINGS = flj.find_couplings(networks.mlp, PARAMS, X)
ESTIMATOR = flj.inverse.kfac(MODEL, 0.05, labels="empirical")


@pytest.fixture(scope="module")
def state():
    return flj.fit(ESTIMATOR, PARAMS, BATCHES, key=jax.random.key(2))


def dense_score(inverse, name, index):
    """`½ w_Bᵀ [(F⁻¹)_BB]⁻¹ w_B` of a part of one leaf, from a dense matrix."""
    leaf = np.zeros(PARAMS[name].shape, bool)
    leaf[index] = True
    marks = {k: np.zeros(v.shape, bool) for k, v in PARAMS.items()} | {name: leaf}
    places = np.flatnonzero(dense.ravel(marks))
    w = dense.ravel(PARAMS)[places]
    return w @ np.linalg.solve(inverse[np.ix_(places, places)], w) / 2


def test_units_have_the_scores_of_their_blocks_also_where_couplings_meet(state):
    scores = flj.unit_scores(ESTIMATOR, state, PARAMS, COUPLINGS)
    inverse = dense.matrix_of(lambda v: ESTIMATOR.multiply(state, v), PARAMS)
    assert scores.couplings == COUPLINGS and len(COUPLINGS) == 2
    for coupling, values in zip(COUPLINGS, scores.values, strict=True):
        for unit, value in enumerate(values):
            parts = [
                dense_score(inverse, name, (*[slice(None)] * axis, unit)) for name, axis in coupling
            ]
            np.testing.assert_allclose(value, sum(parts), rtol=2e-3)
    # sums of single scores would be others
    singles = flj.obs_saliency(PARAMS, ESTIMATOR.diagonal(state, PARAMS))
    sums = singles["b1"] + singles["w1"].sum(0) + singles["w2"].sum(1)
    assert np.abs(scores.values[0] / sums - 1).max() > 0.05


def test_chosen_units_are_compensated_and_removed(state):
    scores = flj.unit_scores(ESTIMATOR, state, PARAMS, COUPLINGS)
    goal = flj.targets.flops(150)
    masks = flj.choose_units(networks.mlp, PARAMS, scores, goal, X)
    prune = lambda **options: flj.prune_one_shot(
        MODEL,
        PARAMS,
        ESTIMATOR,
        BATCHES,
        sparsity=flj.targets.masks(masks),
        held_out=None,
        **options,
    )
    with_compensation = prune(stages=flj.Stages(1, state=state))
    without = prune(stages=1, compensation=flj.compensation.none())
    for result in (with_compensation, without):
        jax.tree.map(np.testing.assert_array_equal, result.masks, masks)
        assert all(
            (np.asarray(w)[~np.asarray(m)] == 0).all()
            for w, m in zip(*map(jax.tree.leaves, (result.params, result.masks)), strict=True)
        )
    loss = lambda params: float(flj.loss(MODEL, params, BATCHES[0]))
    rises = [loss(result.params) - loss(PARAMS) for result in (with_compensation, without)]
    assert 0 < 2 * rises[0] < rises[1]
    small = flj.compact(networks.mlp, with_compensation.params, with_compensation.masks, X)
    assert small.report.flops[1] <= 150 and not small.report.folded
    np.testing.assert_allclose(
        networks.mlp(small.params, X), networks.mlp(with_compensation.params, X), atol=1e-5
    )


def test_stages_go_through_the_given_masks_lowest_scores_first():
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), PARAMS)
    masks["w2"] = masks["w2"].at[:4].set(False)
    masks["b1"] = masks["b1"].at[:4].set(False)
    found = []
    result = flj.prune_one_shot(
        MODEL,
        PARAMS,
        flj.inverse.identity(),
        BATCHES,
        sparsity=flj.targets.masks(masks),
        stages=flj.Stages(3, on_stage=lambda r: found.append(r.masks)),
    )
    jax.tree.map(np.testing.assert_array_equal, result.masks, masks)
    total = sum(x.size for name, x in PARAMS.items() if name[0] == "w") + 8  # and the bias b1
    assert result.stages[-1]["sparsity"] == pytest.approx(28 / total)
    first, second = (~np.asarray(found[0][k]) for k in ("w2", "b1"))
    gone = np.abs(np.concatenate([PARAMS["w2"][first], PARAMS["b1"][second]]))
    left = ~np.asarray(masks["w2"]) & ~first
    assert 0 < gone.size < 28 and gone.max() <= np.abs(np.asarray(PARAMS["w2"])[left]).min()


def test_zeros_of_the_weights_stay():
    """As scattered pruning left them, but not zeros of biases, which were never trained."""
    params = PARAMS | {"w3": PARAMS["w3"].at[0, 0].set(0), "b1": jnp.zeros(8)}
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    masks["b1"] = masks["b1"].at[0].set(False)
    result = flj.prune_one_shot(
        MODEL, params, ESTIMATOR, BATCHES, sparsity=flj.targets.masks(masks), stages=1
    )
    assert not result.masks["w3"][0, 0] and result.params["w3"][0, 0] == 0
    assert int((~result.masks["b1"]).sum()) == 1


def test_own_scores_of_units():
    scores = flj.UnitScores(COUPLINGS, [np.arange(8.0), np.full(6, 100.0)])
    masks = flj.choose_units(networks.mlp, PARAMS, scores, flj.targets.flops(180), X)
    alive = np.asarray(masks["b1"])
    assert 0 < alive.sum() < 8 and alive[-alive.sum() :].all() and masks["b2"].all()


ONES = jax.tree.map(lambda w: jnp.ones(w.shape, bool), PARAMS)


@pytest.mark.parametrize(
    "scores, options, message",
    [
        (flj.UnitScores(COUPLINGS, [np.ones(8)]), {}, "values for each of its 2 couplings, got 1"),
        (
            flj.UnitScores(COUPLINGS, [np.ones(8), np.ones(5)]),
            {},
            r"values\[1\] must have one score",
        ),
        (flj.UnitScores(COUPLINGS, [-np.ones(8), np.ones(6)]), {}, r"values\[0\] must be finite"),
        (
            flj.UnitScores(COUPLINGS, [np.ones(8), np.ones(6)]),
            {"couplings": COUPLINGS},
            "couplings must be left out",
        ),
    ],
)
def test_bad_scores_of_units(scores, options, message):
    with pytest.raises(ValueError, match=message):
        flj.choose_units(networks.mlp, PARAMS, scores, flj.targets.flops(150), X, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"saliency": "auto"}, "saliency must be one of obs, obd"),
        ({"saliency": "l2"}, "saliency must be one of"),
        ({"couplings": [[("w9", 0)]]}, "'w9' is not a leaf"),
        ({"couplings": "w1"}, "couplings must be a list"),
        ({"masks": PARAMS}, "masks must be booleans"),
    ],
)
def test_bad_arguments_of_scores(state, changes, message):
    arguments = {"couplings": COUPLINGS, **changes}
    with pytest.raises(ValueError, match=message):
        flj.unit_scores(ESTIMATOR, state, PARAMS, **arguments)


@pytest.mark.parametrize(
    "masks, options, message",
    [
        (ONES, {}, "must prune and keep some"),
        (jax.tree.map(jnp.logical_not, ONES), {}, "must prune and keep some"),
        (PARAMS, {}, "the target's masks must be booleans"),
        (ONES["w1"], {}, "the target's masks must have the structure"),
        (ONES, {"prunable": "w"}, "prunable must be left out with targets.masks"),
        (ONES, {"scope": "layer"}, "scope must be left out with targets.masks"),
        (ONES, {"pattern": flj.patterns.units()}, "pattern must be left out with targets.masks"),
        (ONES, {"selection": flj.selection.swaps()}, "selection must be left out"),
    ],
)
def test_masks_that_can_not_be_a_target(masks, options, message):
    with pytest.raises(ValueError, match=message):
        flj.prune_one_shot(
            MODEL, PARAMS, ESTIMATOR, BATCHES, sparsity=flj.targets.masks(masks), **options
        )


def test_gradual_pruning_refuses_masks():
    with pytest.raises(ValueError, match="sparsity must be"):
        flj.gradual_prune(flj.inverse.identity(), flj.targets.masks(ONES)).init(PARAMS)


def test_couplings_with_constants():
    """Statistics of a norm have no score, but go with their unit."""
    params = {"a": jnp.arange(1.0, 9).reshape(2, 4), "c": jnp.ones((4, 3))}
    stats = {"mean": jnp.arange(4.0)}
    f = lambda p, x, stats: jnp.tanh(x @ p["a"] - stats["mean"]) @ p["c"]
    x = jax.random.normal(jax.random.key(0), (3, 2))
    couplings = flj.find_couplings(f, params, x, constants=stats)
    scores = flj.unit_scores(flj.inverse.identity(), (), params, couplings)
    expected = ((params["a"] ** 2).sum(0) + (params["c"] ** 2).sum(1)) / 2
    np.testing.assert_allclose(scores.values[0], expected)
    goal = flj.targets.weights(10)
    masks = flj.choose_units(f, params, scores, goal, x, constants=stats)
    small = flj.compact(f, params, masks, x, constants=stats)
    assert small.constants["mean"].tolist() == [2, 3]
