"""Scores by name, held-out data that are set aside, and choices by the measured loss."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.pruning import _paired
from fishleg_jax.pruning.one_shot import choice, steps
from fishleg_jax.pruning.one_shot.held_out import FEWEST, set_aside
from fishleg_jax.pruning.scores import scores_by
from tests import dense

MODEL = dense.categorical_mlp()
# one of each for many tests, that it compiles once
LINEAR = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
DIAGONAL = flj.inverse.diagonal(LINEAR, 0.1)
SLIGHTLY_DAMPED = flj.inverse.diagonal(LINEAR, 1e-3)


def linear_problem(key, examples=200):
    """A linear model with correlated inputs, at the minimum of its loss."""
    keys = jax.random.split(key, 4)
    mixed = jax.random.normal(keys[0], (6, 6)) + 2 * jnp.eye(6)
    inputs = jax.random.normal(keys[1], (examples, 6)) @ mixed
    weights = jax.random.normal(keys[2], (6, 2))
    labels = inputs @ weights + jax.random.normal(keys[3], (examples, 2))
    best = jnp.linalg.lstsq(inputs, labels)[0]
    batches = [(inputs[i : i + 20], labels[i : i + 20]) for i in range(0, examples, 20)]
    return LINEAR, best, batches


@pytest.mark.parametrize("name", ["kfac", "diagonal", "fishleg", "mfac"])
def test_scores_by_name_are_their_formulas(x64, key, name):
    params = dense.mlp_params(key, (3, 4, 3), jnp.float64)
    batch = dense.classification_batch(key, 48, dtype=jnp.float64)
    options = {"window": 48} if name == "mfac" else {}
    estimator = getattr(flj.inverse, name)(MODEL, damping=0.1, **options)
    state = flj.fit(estimator, params, [batch], key=key)
    everything = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    found = {
        s: dense.ravel(scores_by(s, estimator, state, params, everything))
        for s in ("obs", "obd", "mixture", "magnitude", "auto")
    }
    w = dense.ravel(params)
    fisher = dense.ravel(dense.jitted(estimator.fisher_diagonal)(state, params))
    inverse = dense.ravel(dense.jitted(estimator.diagonal)(state, params))
    np.testing.assert_allclose(found["obs"], w**2 / inverse / 2, rtol=1e-12)
    np.testing.assert_allclose(found["obd"], w**2 * np.maximum(fisher, 0) / 2, rtol=1e-12)
    np.testing.assert_allclose(found["mixture"], np.sqrt(found["obs"] * found["obd"]), rtol=1e-12)
    np.testing.assert_allclose(found["magnitude"], w**2 / 2, rtol=1e-12)
    np.testing.assert_array_equal(found["auto"], found["obs"])


@pytest.mark.parametrize("saliency", ["obs", "obd", "mixture", "magnitude"])
def test_one_shot_prunes_the_lowest_scores(key, saliency):
    model, weights, batches = linear_problem(key)
    estimator = DIAGONAL
    state = flj.fit(estimator, weights, batches, key=key)
    everything = jnp.ones(weights.shape, bool)
    expected = flj.make_masks(scores_by(saliency, estimator, state, weights, everything), 0.5)
    result = flj.prune_one_shot(
        model, weights, estimator, batches, sparsity=0.5, saliency=saliency, held_out=None, stages=1
    )
    np.testing.assert_array_equal(result.masks, expected)
    assert "tried" not in result.stages[0]


def test_scores_may_be_a_function(key):
    model, weights, batches = linear_problem(key)
    seen = []

    def saliency(params, masks, estimator, state, gradient):
        seen.append((masks.shape, gradient))
        return jnp.arange(params.size, dtype=jnp.float32).reshape(params.shape)

    result = flj.prune_one_shot(
        *(model, weights, DIAGONAL, batches),
        sparsity=0.5,
        saliency=saliency,
        stages=2,
    )
    np.testing.assert_array_equal(result.masks.ravel(), np.arange(12) >= 6)
    assert seen[0] == ((6, 2), None)


def test_auto_takes_the_scores_with_the_lowest_held_out_loss(key):
    """With an estimate whose inverse is nonsense and whose Fisher is right, OBD wins."""
    model, weights, batches = linear_problem(key)
    good = SLIGHTLY_DAMPED
    exact = jnp.mean(jnp.concatenate([b[0] for b in batches]) ** 2, axis=0)[:, None]

    def upside_down(state, params, mask=None):
        return (weights * exact) ** 2  # the most important weights get the lowest OBS scores

    estimator = good._replace(diagonal=upside_down)
    options = {"sparsity": 0.5, "stages": 1, "compensation": flj.compensation.none()}
    result = flj.prune_one_shot(model, weights, estimator, batches, **options)
    (stage,) = result.stages
    tried = stage["tried"]
    assert set(tried) == {"obs", "magnitude", "obd", "mixture", "obs damping×0.1", "obs damping×10"}
    assert stage["saliency"] in ("obd", "magnitude", "mixture")
    assert tried[stage["saliency"]] < tried["obs"]
    # the same masks as with that saliency by itself, on the data that the curvature saw
    again = flj.prune_one_shot(
        model, weights, estimator, batches, saliency=stage["saliency"], **options
    )
    np.testing.assert_array_equal(again.masks, result.masks)


def test_auto_stays_with_obs_if_nothing_is_better():
    losses = np.linspace(1.0, 3.0, 50)
    parts = lambda x: [jnp.asarray(x[:20]), jnp.asarray(x[20:])]
    better = lambda x, y: _paired.better(choice.MARGIN, parts(x), parts(y))
    assert not better(losses, losses)
    assert not better(losses + 0.1 * np.cos(np.arange(50)), losses)  # noise around zero
    assert better(losses - 0.1, losses)
    assert not better(losses + 0.1, losses)
    assert not _paired.better(0.0, [jnp.ones(1)], [jnp.full(1, 2.0)])  # one example says nothing


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(-9, 9), min_size=12, max_size=12))
def test_the_standard_error_is_that_of_all_examples(numbers):
    whole = np.asarray(numbers, np.float32)
    mean, error = _paired.mean_and_error([jnp.asarray(whole[:5]), jnp.asarray(whole[5:])])
    whole = whole.astype(np.float64)
    assert mean == pytest.approx(whole.mean(), abs=1e-4)
    assert error == pytest.approx(whole.std(ddof=1) / np.sqrt(12), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"held_out": None},
        {"held_out": 0},
        {"saliency": "obs", "stages": 1},
        {"stages": flj.Stages(state=1)},
    ],
)
def test_nothing_is_tried_without_held_out_data_or_with_scores_that_are_given(key, options):
    model, weights, batches = linear_problem(key)
    estimator = DIAGONAL
    if "saliency" not in options and "stages" in options:
        state = flj.fit(estimator, weights, batches, key=key)
        options = {"stages": flj.Stages(state=state)}
    result = flj.prune_one_shot(model, weights, estimator, batches, sparsity=0.5, **options)
    assert "tried" not in result.stages[0]


def names_now(*stages, **fields):
    """Names of the candidates after stages that were won by these, of losses by name."""
    estimator = flj.inverse.diagonal(MODEL, 0.1)._replace(**fields)
    plan = SimpleNamespace(surgeon=SimpleNamespace(estimator=estimator))
    params = dense.mlp_params(jax.random.key(0), (3, 4, 3))
    state = estimator.init(params)
    reports = [{"saliency": winner, "tried": tried} for winner, tried in stages]
    return [str(candidate) for candidate in choice.candidates_now(plan, state, reports)]


ALL = ["obs", "magnitude", "obd", "mixture", "obs damping×0.1", "obs damping×10"]
LOSSES = dict(zip(ALL, [3.0, 6.0, 1.0, 2.0, 5.0, 4.0], strict=True))


def test_where_a_winner_repeats_its_nearest_rivals_alone_are_tried():
    won = ("obd", LOSSES)
    assert names_now() == names_now(won) == ALL
    assert names_now(won, won) == ["obs", "obd", "mixture"]
    assert names_now(won, ("mixture", LOSSES)) == ALL  # not where it changes
    safe = ("obs", LOSSES)
    assert names_now(safe, safe) == ["obs", "obd"]
    far = ("obs damping×100", LOSSES | {"obs damping×100": 0.5})
    assert names_now(far, far) == ["obs", "obs damping×100", "obd"]


def test_every_fourth_stage_tries_all_again():
    won, few = ("obd", LOSSES), ("obd", {name: LOSSES[name] for name in ("obs", "obd", "mixture")})
    assert (
        names_now(won, won, few) == names_now(won, won, few, few)[:3] == ["obs", "obd", "mixture"]
    )
    assert names_now(won, won, few, few, few) == ALL
    assert names_now(*[(None, {})] * 3) == ALL  # where scores are not chosen
    assert names_now(won, (None, {}), (None, {})) == ALL


def test_a_stage_has_tried_all_if_it_has_tried_them_by_name():
    """Not if another damping that was followed makes as many."""
    names = ["obs", "obs damping×10", "obs damping×0.1", "obs damping×100"]
    stage = "obs damping×10", {name: LOSSES.get(name, 9.0) for name in names}
    found = names_now(stage, stage, stage, fisher_diagonal=None)
    assert found == ["obs", "magnitude", "obs damping×0.1", "obs damping×10"]


def test_stages_report_what_they_tried(key):
    model, weights, batches = linear_problem(key)
    result = flj.prune_one_shot(model, weights, DIAGONAL, batches, sparsity=0.8, stages=8)
    numbers = [len(stage["tried"]) for stage in result.stages]
    winners = [stage["saliency"] for stage in result.stages]
    assert numbers[0] >= 6 and min(numbers) <= 4
    for i, number in enumerate(numbers):
        again = i >= 2 and winners[i - 1] == winners[i - 2] and max(numbers[max(i - 3, 0) : i]) >= 6
        assert (number <= 4) == again, (numbers, winners)


def test_magnitude_pruning_stays_what_it_is(key):
    """The identity has nothing to choose: the same masks, and no weight moves."""
    params = dense.mlp_params(key, (3, 6, 3))
    batches = [dense.classification_batch(key, 60)]
    result = flj.prune_one_shot(MODEL, params, flj.inverse.identity(), batches, sparsity=0.5)
    expected = flj.apply_masks(params, result.masks)
    jax.tree.map(np.testing.assert_array_equal, result.params, expected)
    assert len(result.stages) == 1 and "tried" not in result.stages[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=12), share=st.floats(0.0, 0.9))
def test_examples_set_aside_are_disjoint_and_about_as_many_as_asked(sizes, share):
    ends = np.cumsum(sizes)
    batches = [(np.arange(e - n, e), np.arange(e - n, e)) for e, n in zip(ends, sizes, strict=True)]
    first, second = set_aside(batches, share)
    seen = np.concatenate([b[0] for b in first])
    if second is None:
        np.testing.assert_array_equal(seen, np.arange(ends[-1]))
        return
    held = np.concatenate([b[0] for b in second])
    np.testing.assert_array_equal(np.sort(np.concatenate([seen, held])), np.arange(ends[-1]))
    assert len(held) >= FEWEST
    for inputs, targets in (*first, *second):
        np.testing.assert_array_equal(inputs, targets)
        assert len(inputs)


def test_one_batch_is_divided_in_multiples_of_eight():
    inputs, constants = np.arange(100.0), {"mean": np.ones(3)}
    (first,), (second,) = set_aside([(inputs, inputs, constants)], 0.2)
    assert (len(first[0]), len(second[0])) == (84, 16)
    assert second[2] is constants
    assert set_aside([(inputs, inputs)], 0.05)[1] is None  # too few
    # spread over a batch that may be sorted
    assert np.diff(second[0]).max() <= 7 and second[0][0] < 7 and second[0][-1] > 92


@pytest.mark.slow
def test_stages_pay_even_where_the_quadratic_model_is_exact(key):
    """Scores of single weights know nothing of the others that go with them."""
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (400, 24)) @ jax.random.normal(keys[1], (24, 24)) / 5
    weights = jax.random.normal(keys[2], (24, 4))
    y = x @ weights + 0.1 * jax.random.normal(keys[3], (400, 4))
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 400, 50)]
    errors, kfac = {}, flj.inverse.kfac(LINEAR)
    for stages in (None, 1):
        found = flj.prune_one_shot(
            LINEAR, weights, kfac, batches, sparsity=0.5, stages=stages, saliency="obs"
        )
        errors[stages] = float(jnp.mean((x @ found.params - y) ** 2))
    assert errors[None] < 0.9 * errors[1]


def test_a_number_of_weights_takes_the_same_stages_as_its_sparsity(key):
    model, weights, batches = linear_problem(key)
    estimator = SLIGHTLY_DAMPED
    by_number, by_share = (
        flj.prune_one_shot(model, weights, estimator, batches, sparsity=goal, saliency="obs")
        for goal in (flj.targets.weights(6), 0.5)
    )
    assert len(by_number.stages) == len(by_share.stages)
    np.testing.assert_array_equal(by_number.masks, by_share.masks)


def test_stages_that_choose_themselves_end_at_the_sparsity(key):
    model, weights, batches = linear_problem(key)
    estimator = SLIGHTLY_DAMPED
    # a rise that is nothing beside the losses of examples takes one stage
    small = weights.at[:3].multiply(1e-3)
    easy = flj.prune_one_shot(model, small, estimator, batches, sparsity=0.5, masks=None)
    assert [s["sparsity"] for s in easy.stages] == [0.5]
    assert "saliency" in str(easy.report)
    # tanh units far from their linear range need more of them
    params = jax.tree.map(lambda p: 3 * p, dense.mlp_params(key, (3, 40, 3)))
    inputs = jax.random.normal(key, (400, 3))
    labels = jax.random.categorical(key, 3 * dense.mlp(params, inputs))
    batches = [(inputs[i : i + 40], labels[i : i + 40]) for i in range(0, 400, 40)]
    result = flj.prune_one_shot(
        MODEL,
        params,
        flj.inverse.diagonal(MODEL),
        batches,
        sparsity=0.9,
        stages=flj.Stages(most=5),
        saliency="obs",
    )
    found = [s["sparsity"] for s in result.stages]
    assert 1 < len(found) <= 5 and found == sorted(found) and found[-1] == 0.9
    assert flj.sparsity(result.params) == int(0.9 * 240) / 240
    for stage in result.stages:
        assert steps.SHRINK <= stage["growth"] <= steps.GROW


@settings(max_examples=40, deadline=None, derandomize=True)
@given(predicted=st.floats(-1, 10), actual=st.floats(-1, 10), noise=st.floats(0, 1))
def test_a_stage_grows_as_its_prediction_allows(predicted, actual, noise):
    growth_of = lambda actual, noise, rise=np.inf: steps.growth_of(
        {"predicted": predicted, "actual": actual}, noise, rise
    )
    growth = growth_of(actual, noise)
    assert steps.SHRINK <= growth <= steps.GROW
    if actual <= predicted:
        assert growth == steps.GROW
    # a worse error never lengthens the next stage, nor does a surer loss or a lower bound
    assert growth_of(actual + 1, noise) <= growth
    assert growth_of(actual, noise / 2) <= growth
    assert growth_of(actual, noise, rise=1.0) <= growth
    assert growth_of(float("nan"), noise) == steps.SHRINK
    if actual > 0:
        assert growth_of(actual, 0.0, rise=actual / 100) == steps.SHRINK


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"saliency": "obx"}, "saliency must be one of auto, obs, obd, mixture, magnitude"),
        ({"saliency": 3}, "saliency must be one of auto.* or a function"),
        ({"held_out": 1.0}, r"held_out must be batches or a share in \[0, 1\), got 1.0"),
        ({"held_out": -0.1}, r"held_out must be batches or a share"),
        ({"stages": flj.Stages(most=0)}, "most must be"),
        ({"held_out": 0.99}, "held_out=0.99 can't be set aside from the batches: "),
    ],
)
def test_bad_arguments_are_named(key, options, text):
    model, weights, batches = linear_problem(key)
    with pytest.raises(ValueError, match=text):
        flj.prune_one_shot(
            model, weights, flj.inverse.diagonal(model), batches, sparsity=0.5, **options
        )


def test_obd_needs_the_diagonal_of_the_fisher(key):
    model, weights, batches = linear_problem(key)
    estimator = flj.inverse.diagonal(model)._replace(fisher_diagonal=None)
    with pytest.raises(ValueError, match="saliency='obd' needs an estimator with"):
        flj.prune_one_shot(model, weights, estimator, batches, sparsity=0.5, saliency="obd")
