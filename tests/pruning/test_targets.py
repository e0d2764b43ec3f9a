"""Targets other than a sparsity: so much kept, or so much lost."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.pruning.masks.build import number_to_prune
from fishleg_jax.pruning.one_shot import budget as _budget
from tests import dense
from tests.pruning.test_one_shot import untouchable

MODEL = flj.Model(
    lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], axis=1), flj.likelihoods.gaussian()
)
IDENTITY = flj.inverse.identity()
NONE = flj.compensation.none()
SIZES = {"a": (10, 3), "b": (10, 1)}
WEIGHTS = 40


def problem(seed=0, dtype=jnp.float32):
    """Every weight by itself: pruning w costs w² / 20, exactly."""
    values = np.random.default_rng(seed).normal(size=WEIGHTS)
    params = {
        "a": jnp.array(values[:30].reshape(10, 3), dtype),
        "b": jnp.array(values[30:].reshape(10, 1), dtype),
    }
    inputs = jnp.eye(10, dtype=dtype)
    return params, [(inputs, MODEL.predict(params, inputs))]


def prune(params, batches, target, estimator=IDENTITY, **options):
    defaults = {"compensation": NONE, "prunable": ".*"}  # a kernel of one output, too
    return flj.prune_one_shot(
        MODEL, params, estimator, batches, sparsity=target, **defaults | options
    )


def pruned(result):
    return sum(int(jnp.sum(~m)) for m in jax.tree.leaves(result.masks))


def losses(params):
    """The loss that the pruning of so many weights by magnitude adds, for every number."""
    return np.cumsum([0.0, *np.sort(dense.ravel(params) ** 2)]) / 20


# so many weights


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("kept", [1, 7, 13, 39, 40, 1000])
def test_so_many_weights_are_kept(kept, stages):
    params, batches = problem()
    result = prune(params, batches, flj.targets.weights(kept), stages=stages)
    assert pruned(result) == max(WEIGHTS - kept, 0)
    assert len(result.stages) == stages
    if kept < WEIGHTS:
        assert result.stopped is None
    else:
        assert result.stopped.startswith("nothing had to be pruned")
        assert result.stopped.endswith(f"within targets.weights({kept})")


@pytest.mark.parametrize("kept", [2, 3, 11, 39])
def test_so_many_weights_with_a_threshold_a_layer(kept):
    """No more, and no fewer than a step of every layer's rounding away."""
    params, batches = problem()
    result = prune(params, batches, flj.targets.weights(kept), scope="layer")
    assert kept - 1 <= WEIGHTS - pruned(result) <= kept


@hypothesis.given(st.integers(1, 10**7), st.data())
def test_a_count_as_a_sparsity_is_that_count(weights, data):
    count = data.draw(st.integers(0, weights - 1))
    assert number_to_prune(_budget.sparsity_of(count, weights), weights) == count


@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.data())
def test_the_sparsity_of_a_number_of_weights_is_the_lowest(sizes, data):
    total = sum(sizes)
    at_most = data.draw(st.integers(len(sizes), total + 1))
    kept = lambda s: sum(n - number_to_prune(s, n) for n in sizes)
    counts = [kept(_budget.sparsity_of(k, total)) for k in range(total)]
    expected = next(k for k, n in enumerate(counts) if n <= at_most)
    assert _budget.of_weights(at_most, sizes) == _budget.sparsity_of(expected, total)


# so much cost


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 100), st.floats(0.02, 1.1), st.booleans(), st.integers(1, 3))
def test_a_budget_is_kept_and_used_up(seed, share, of_leaves, stages):
    """By brute force: the fewest weights, in the order of their scores, that bring it below."""
    params, batches = problem(seed)
    random = np.random.default_rng(seed)
    costs = jax.tree.map(lambda p: random.integers(0, 9, p.shape), params)
    if of_leaves:
        costs = {"a": 3.0, "b": 0.75}
    each = dense.ravel(jax.tree.map(lambda p, c: jnp.broadcast_to(c, p.shape), params, costs))
    order = np.argsort(dense.ravel(params) ** 2, kind="stable")
    kept = np.sum(each, dtype=np.float64) - np.cumsum([0, *each[order][:-1]], dtype=np.float64)
    budget = max(share * kept[0], each.min(), 0.1)
    result = prune(params, batches, flj.targets.cost(budget, costs), stages=stages)
    fits = np.flatnonzero(kept <= budget)
    assert pruned(result) == (fits[0] if len(fits) else WEIGHTS - 1)
    assert (result.stopped is None) == bool(len(fits) and fits[0] > 0)
    assert result.stages[-1]["cost"] == pytest.approx(kept[pruned(result)])


def test_bytes_and_operations_are_counted():
    params, batches = problem()
    params["b"] = params["b"].astype(jnp.bfloat16)
    by_bytes = prune(params, batches, flj.targets.bytes(60))
    a, b = (int(m.sum()) for m in jax.tree.leaves(by_bytes.masks))
    assert 60 - 4 < 4 * a + 2 * b <= 60
    by_flops = prune(params, batches, flj.targets.flops(33))  # two for every weight
    assert pruned(by_flops) == WEIGHTS - 16


def test_a_ranking_that_changes_from_stage_to_stage_still_ends_at_the_budget(key):
    """Measured by the weights that are left; the sparsity of the first estimate is another one."""
    params, batches = problem()
    costs = {"a": 1.0, "b": 10.0}

    def diagonal(state, params, mask=None):
        # what was dear becomes cheap once something is pruned
        some = sum(jnp.sum(~m) for m in jax.tree.leaves(mask)) > 0
        return {"a": jnp.ones((10, 3)), "b": jnp.where(some, 1e4, 1.0) * jnp.ones((10, 1))}

    estimator = IDENTITY._replace(diagonal=diagonal)
    target = flj.targets.cost(60, costs)
    one = prune(params, batches, target, estimator)
    many = prune(params, batches, target, estimator, stages=3)
    assert pruned(many) < pruned(one)
    for result in (one, many):
        cost = sum(float(jnp.sum(m)) * costs[k] for k, m in result.masks.items())
        assert 60 - 10 < cost <= 60 and result.stages[-1]["cost"] == cost


@pytest.mark.parametrize("costs", [{"a": 1.0, "b": 10.0}, {"a": np.ones((10, 3)), "b": 10.0}])
def test_only_prunable_weights_count(costs):
    params, batches = problem()
    for target in (flj.targets.cost(12, costs), flj.targets.weights(12)):
        result = prune(params, batches, target, prunable="a")
        assert int(result.masks["a"].sum()) == 12 and bool(result.masks["b"].all())
    costs["b"] = np.full((10, 1), -1.0)  # not looked at
    assert prune(params, batches, flj.targets.cost(12, costs), prunable="a").stopped is None


def test_a_budget_is_kept_in_every_layer():
    params, batches = problem()
    result = prune(params, batches, flj.targets.cost(100, {"a": 1.0, "b": 10.0}), scope="layer")
    a, b = (int(m.sum()) for m in jax.tree.leaves(result.masks))
    assert 100 - 11 < a + 10 * b <= 100 and abs(a - 3 * b) <= 3


def test_a_budget_that_only_the_cheapest_weight_would_meet():
    """The dearest weight is the biggest: it stays, and the result says so."""
    params, batches = problem()
    params["b"] = params["b"].at[0].set(100.0)
    result = prune(params, batches, flj.targets.cost(2, {"a": 1.0, "b": 10.0}), stages=2)
    assert pruned(result) == WEIGHTS - 1 and bool(result.masks["b"][0, 0])
    assert "the budget of 2 was not reached" in result.stopped and "10 is kept" in result.stopped
    assert str(result.report).splitlines()[-1] == f"Stopped: {result.stopped}"


# so much lost


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("measured", [True, False])
def test_the_loss_rises_by_no_more(x64, stages, measured):
    """The next weight would break it; half a squared magnitude predicts ten times the loss."""
    params, batches = problem(dtype=jnp.float64)
    expected = losses(params) * (1 if measured else 10)
    limit = float(expected[22] + expected[23]) / 2
    target = flj.targets.loss_increase(limit, measured=measured)
    result = prune(params, batches, target, stages=stages)
    assert pruned(result) == 22 and result.stopped is None
    assert result.stages[-1]["lost"] == pytest.approx(expected[22])
    before = [s["lost"] for s in result.stages]
    assert before == sorted(before) and len(before) <= stages


def counting_metric():
    """Minus the number of pruned weights, which lists what it was asked for."""
    tried = []

    def metric(weights):
        tried.append(int((dense.ravel(weights) == 0).sum()))
        return -tried[-1]

    return tried, metric


def test_a_resolution_ends_the_search():
    params, batches = problem()
    tried, metric = counting_metric()
    result = prune(params, batches, flj.targets.metric(metric, 22, resolution=0.1))
    assert tried == [0, 39, 19, 29, 24, 21]  # 21 holds and 24 does not: less than a tenth of 40
    assert pruned(result) == 21 and result.stopped is None


def counting():
    """A sound estimate that counts its fits, and the sparsities that it was fitted at."""
    fits = []

    def update(state, params, batch, key, mask=None):
        jax.debug.callback(
            lambda w: fits.append(int((np.asarray(w) == 0).sum())),
            jnp.concatenate([params["a"].ravel(), params["b"].ravel()]),
        )
        return state

    return fits, IDENTITY._replace(update=update, updates=1)


def test_one_stage_is_fitted_once_for_all_that_is_tried():
    params, batches = problem()
    fits, estimator = counting()
    tried, metric = counting_metric()
    result = prune(params, batches, flj.targets.metric(metric, 17.5), estimator)
    jax.effects_barrier()
    assert pruned(result) == 17 and fits == [0]
    assert tried[:2] == [0, 39] and 17 in tried and 18 in tried and len(tried) <= 9


def test_several_stages_are_fitted_once_each_and_the_last_is_bisected():
    """What is fitted at 30 of 40 is used for all that is tried between 30 and 35."""
    params, batches = problem()
    fits, estimator = counting()
    tried, metric = counting_metric()
    target = flj.targets.metric(metric, 37, highest=0.96875)
    result = prune(params, batches, target, estimator, stages=5)
    jax.effects_barrier()
    rungs = [20, 30, 35, 37, 38]
    assert fits == [0, 20, 30, 35, 37]
    assert tried == [0, *rungs] and pruned(result) == 37 and result.stopped is None
    tried.clear(), fits.clear()
    result = prune(params, batches, target._replace(at_most=32.0), estimator, stages=5)
    jax.effects_barrier()
    assert fits == [0, 20, 30] and pruned(result) == 32
    assert tried[:4] == [0, 20, 30, 35] and set(tried[4:]) <= {31, 32, 33, 34}


def test_a_limit_that_is_not_used_up_says_so():
    params, batches = problem()
    result = prune(params, batches, flj.targets.loss_increase(1e6, highest=0.75), stages=2)
    assert pruned(result) == 30
    assert "not reached at a sparsity of 0.75" in result.stopped
    assert result.report.stopped == result.stopped


@pytest.mark.parametrize("stages", [1, 3])
def test_a_limit_that_nothing_keeps_leaves_the_weights_as_they_are(stages):
    params, batches = problem()
    result = prune(params, batches, flj.targets.loss_increase(0.0), stages=stages)
    jax.tree.map(np.testing.assert_array_equal, result.params, params)
    assert pruned(result) == 0 and result.stages == ()
    assert "nothing was pruned, because even a sparsity of 0.025 loses" in result.stopped
    assert "Stopped: nothing was pruned" in str(result.report)


def test_what_is_predicted_of_the_group_update_adds_up(key):
    """On held-out batches the loss is measured; the prediction knows only the curvature's."""
    params = dense.mlp_params(key, (3, 6, 3))
    model = dense.categorical_mlp()
    data = [dense.classification_batch(jax.random.fold_in(key, i), 12) for i in range(2)]
    group = flj.compensation.group(damping=0.01)
    estimator = flj.inverse.diagonal(model, 1e-2)

    def at(target):
        return flj.prune_one_shot(
            model,
            params,
            estimator,
            data[:1],
            sparsity=target,
            stages=2,
            compensation=group,
            held_out=data[1:],
        )

    result = at(flj.targets.loss_increase(0.02, measured=False, highest=0.9))
    predicted = [s["predicted"] for s in result.stages]
    assert result.stages[-1]["lost"] == pytest.approx(sum(predicted), rel=1e-6)
    assert sum(predicted) <= 0.02 and pruned(result) > 0
    result = at(flj.targets.loss_increase(0.02, highest=0.9))
    loss = flj.curvature(model, data[1:]).loss
    assert result.stages[-1]["lost"] <= 0.02
    assert float(loss(result.params) - loss(params)) == pytest.approx(
        result.stages[-1]["lost"], abs=1e-6
    )


def test_a_metric_that_is_nan_somewhere_breaks_the_limit_there():
    params, batches = problem()

    def metric(weights):
        zeros = int((dense.ravel(weights) == 0).sum())
        return float("nan") if zeros > 11 else 1.0

    assert pruned(prune(params, batches, flj.targets.metric(metric, 0.5))) == 11


# what is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t: t.weights(0), "at_most must be a whole number of at least 1, got 0"),
        (lambda t: t.weights(1.5), "at_most must be a whole number"),
        (lambda t: t.weights(True), "at_most must be a whole number"),
        (lambda t: t.bytes(0), "at_most must be a positive finite number, got 0"),
        (lambda t: t.flops(float("inf")), "at_most must be a positive finite number"),
        (lambda t: t.seconds(-1), "at_most must be a positive finite number"),
        (lambda t: t.time_share(1.5), r"at_most must be a share of .* in \(0, 1\], got 1.5"),
        (lambda t: t.time_share(0), r"at_most must be a share of .* in \(0, 1\], got 0"),
        (lambda t: t.time_share("1"), r"at_most must be a share of .* in \(0, 1\], got '1'"),
        (lambda t: t.cost("a", {}), "at_most must be a positive finite number"),
        (lambda t: t.loss_increase(-0.1), "at_most must be a finite number of at least 0"),
        (lambda t: t.loss_increase(float("nan")), "at_most must be a finite number"),
        (lambda t: t.loss_increase(1, highest=1.0), r"highest must be a number in \(0, 1\)"),
        (lambda t: t.loss_increase(1, resolution=0), r"resolution must be a number in \(0, 1\)"),
        (lambda t: t.metric(0.9, 0.01), "function must be a function"),
        (lambda t: t.bytes(True), "at_most must be a positive finite number, got True"),
        (lambda t: t.bytes(np.str_("9")), "at_most must be a positive finite number"),
        (lambda t: t.bytes(np.complex64(1)), "at_most must be a positive finite number"),
        (lambda t: t.cost(3, None), "costs must be a pytree like the parameters, got None"),
        (lambda t: t.cost(3, {"a": "x"}), "costs: 'a' must be a number or an array of numbers"),
        (lambda t: t.loss_increase(np.str_("9")), "at_most must be a finite number"),
        (lambda t: t.loss_increase(1, measured="no"), "measured must be True or False"),
        (lambda t: t.metric(len, -1), "at_most_drop must be a finite number of at least 0"),
    ],
)
def test_targets_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make(flj.targets)


@pytest.mark.parametrize(
    "target, options, message",
    [
        (flj.targets.weights(1), {"scope": "layer"}, r"at least weights\(2\), got weights\(1\)"),
        (flj.targets.bytes(3), {}, "the target in bytes must be at least 4, .* got 3"),
        (flj.targets.flops(3), {"scope": "layer"}, "the target in flops must be at least 4"),
        (flj.targets.cost(3, {"a": 1.0}), {}, "costs must have the structure"),
        (flj.targets.cost(3, {"a": 1.0, "b": -1.0}), {}, "'b' is prunable, .* at least 0"),
        (flj.targets.cost(3, {"a": 1.0, "b": jnp.ones(3)}), {}, "'b' must be a number or have"),
        (flj.targets.metric(lambda p: float("nan"), 1), {}, "function must be a finite number"),
        (flj.targets.metric(lambda p: "good", 1), {}, "function must return a number"),
        (flj.targets.weights(3), {"stages": 0}, "stages must be"),
        (
            flj.targets.loss_increase(3),
            {"stages": flj.Stages(schedule="cosine")},
            "schedule must be one of",
        ),
    ],
)
def test_what_is_known_before_any_work_is_refused_then(target, options, message):
    params, batches = problem()
    with pytest.raises(ValueError, match=message):
        prune(params, batches, target, untouchable(), **options)


def test_a_share_may_be_the_whole():
    assert flj.targets.time_share(1).at_most == 1


def test_numbers_of_numpy_and_jax_are_numbers():
    for kind in (np.int32, jnp.int32):
        assert flj.targets.weights(kind(3)) == flj.targets.weights(3)
        assert flj.targets.bytes(kind(3)) == flj.targets.bytes(3)
    limit = flj.targets.loss_increase(jnp.float32(0.5), measured=np.True_, highest=np.float32(0.5))
    assert limit == flj.targets.loss_increase(0.5, highest=0.5)


def test_a_loss_can_only_be_measured_with_labels():
    params, batches = problem()
    unlabelled = [(batches[0][0], None)]
    with pytest.raises(ValueError, match="loss_increase needs labels"):
        prune(params, unlabelled, flj.targets.loss_increase(0.1), untouchable())
    target = flj.targets.loss_increase(float(losses(params)[5]) * 10.001, measured=False)
    assert pruned(prune(params, unlabelled, target)) == 5


def test_trust_is_asked_at_a_number():
    params, batches = problem()
    with pytest.raises(ValueError, match="sparsity must be a number in"):
        flj.trust(MODEL, params, IDENTITY, batches * 2, sparsity=flj.targets.weights(3))
