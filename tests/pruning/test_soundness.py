"""Numbers that mean nothing are refused: curvature of zero, losses of NaN, too few gradients."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning import _soundness
from fishleg_jax.pruning.compensation import _damping_search, _independent
from fishleg_jax.pruning.compensation._damping_search import Trial
from tests.pruning.test_one_shot import untouchable

GAUSSIAN = flj.likelihoods.gaussian()
GROUP = functools.partial(flj.compensation.group, damping=0.1)
MAKERS = {
    "diagonal": flj.inverse.diagonal,
    "kfac": flj.inverse.kfac,
    "woodfisher": functools.partial(flj.inverse.woodfisher, gradients=12, labels="sampled"),
    "woodfisher, blocks": functools.partial(
        flj.inverse.woodfisher, gradients=12, block_size=4, labels="sampled"
    ),
    "mfac": functools.partial(flj.inverse.mfac, window=12, labels="sampled"),
}
ALL = MAKERS | {"fishleg": functools.partial(flj.inverse.fishleg, damping=1e-2, updates=9)}
# equal calls give one estimator, which is compiled once
ALL = {name: functools.cache(make) for name, make in ALL.items()}


def normalised(params, x, statistics=None):
    """A batch norm between two layers: of the batch's statistics where none are given."""
    x = x @ params["a"]
    mean, variance = (x.mean(0), x.var(0)) if statistics is None else statistics
    return jnp.tanh((x - mean) * jax.lax.rsqrt(variance + 1e-5)) @ params["b"]


def unused(params, x):
    return x @ params["bias"] + 0 * (x @ params["a"]).sum()


TRAINING = flj.Model(normalised, GAUSSIAN)
NIL = flj.Model(unused, GAUSSIAN)


def problem(seed=0, examples=12, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 2))}
    x = jax.random.normal(keys[2], (examples, 3))
    batch = x, jax.random.normal(keys[3], (examples, 2))
    return jax.tree.map(lambda a: a.astype(dtype), (params, batch))


def prune(model, params, estimator, batch, sparsity=0.5, **options):
    return flj.prune_one_shot(model, params, estimator, [batch], sparsity=sparsity, **options)


# examples that depend on their neighbours


@pytest.mark.parametrize("name", [*MAKERS, "fishleg"])
def test_batch_statistics_are_refused_where_single_examples_are_needed(name):
    params, batch = problem()
    estimator = ALL[name](TRAINING)
    with pytest.raises(ValueError, match="model.predict must treat every example independently"):
        prune(TRAINING, params, estimator, batch)
    with pytest.raises(ValueError, match="evaluation mode"):
        flj.fit(estimator, params, [batch], key=jax.random.key(0))


def test_batch_statistics_are_no_matter_to_estimates_of_whole_batches():
    """FishLeg's samples and other gradients may be of whole batches."""
    params, batch = problem()
    for estimator in (
        ALL["fishleg"](TRAINING, samples=1),
        flj.inverse.diagonal(TRAINING, examples_per_gradient=12),
    ):
        masks = prune(
            TRAINING, params, estimator, batch, compensation=flj.compensation.none()
        ).masks
        assert sum(int(jnp.sum(~m)) for m in jax.tree.leaves(masks)) == 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_statistics_that_are_constants_are_not_taken_for_batch_statistics(dtype):
    """Whatever the precision, the depth and the offset of the outputs."""

    def deep(params, x, statistics):
        for _ in range(20):
            x = normalised(params, x, statistics)[:, :1] + x
        return x + 100

    model = flj.Model(deep, GAUSSIAN)
    spoiled = flj.Model(lambda p, x, s: deep(p, x, s) * x.mean(0), GAUSSIAN)
    constants = jax.tree.map(lambda a: a.astype(dtype), (jnp.zeros(4), jnp.ones(4)))
    estimator, of_spoiled = flj.inverse.diagonal(model), flj.inverse.diagonal(spoiled)
    for seed in range(5):
        params, (x, y) = problem(seed, 40, dtype)
        batch = x, jnp.zeros_like(x), constants
        _soundness.check_single_examples(estimator, model, params, [batch])
        # and they are found in the same network
        with pytest.raises(ValueError, match="independently"):
            _soundness.check_single_examples(of_spoiled, spoiled, params, [batch])


def test_neighbours_are_looked_for_where_there_are_some():
    """A batch of one example has none."""
    params, (x, y) = problem()
    estimator = flj.inverse.diagonal(TRAINING)
    one = x[:1], y[:1]
    _soundness.check_single_examples(estimator, TRAINING, params, [one])
    with pytest.raises(ValueError, match="independently"):
        _soundness.check_single_examples(estimator, TRAINING, params, [one, (x, y)])


# curvature that is zero


@pytest.mark.parametrize("name", ALL)
def test_a_curvature_of_zero_is_refused(name):
    """Masks would be those of magnitude, without a word."""
    params, batch = problem()
    params = {"a": params["a"], "bias": jnp.zeros((3, 2))}
    with pytest.raises(ValueError, match="zero for every prunable weight"):
        prune(NIL, params, ALL[name](NIL), batch, prunable="^a$")
    assert prune(NIL, params, flj.inverse.identity(), batch, prunable="^a$").stopped is None


def test_a_curvature_of_zero_is_refused_where_prunable_weights_alone_have_it():
    """Others have a curvature, and with them pruned there is nothing to refuse."""
    params, batch = problem()
    params = {"a": params["a"], "bias": jnp.ones((3, 2))}
    estimator = ALL["diagonal"](NIL)
    assert prune(NIL, params, estimator, batch, prunable="a|bias").stopped is None
    with pytest.raises(ValueError, match="zero for every prunable weight"):
        prune(NIL, params, estimator, batch, prunable="^a$")


@pytest.mark.parametrize("name", ["diagonal", "woodfisher, blocks", "mfac", "kfac"])
def test_a_damping_that_drowns_the_curvature_is_not_refused(name):
    """Then pruning is by magnitude, as asked for."""
    model = flj.Model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], GAUSSIAN)
    params, batch = problem()
    alone = {"compensation": flj.compensation.none()}
    result = prune(model, params, ALL[name](model, damping=1e20), batch, **alone)
    expected = prune(model, params, flj.inverse.identity(), batch, **alone)
    for one, other in zip(*(jax.tree.leaves(r.masks) for r in (result, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_later_stage_without_curvature_ends_the_pruning():
    """With the weights of the stage before it."""

    def predict(params, x):  # dies when more than half of the weights are zero
        alive = jnp.sum(params["a"] == 0) < 7
        return jnp.where(alive, x @ params["a"], 0.0)

    model = flj.Model(predict, GAUSSIAN)
    params, (x, _) = problem()
    batch = x, jnp.zeros((12, 4))
    options = {"stages": flj.Stages(3, schedule="linear"), "compensation": flj.compensation.none()}
    result = prune(model, {"a": params["a"]}, ALL["diagonal"](model), batch, 0.9, **options)
    assert [round(s["sparsity"], 6) for s in result.stages] == [0.3, 0.6]
    assert "zero for every prunable weight" in result.stopped
    assert int(jnp.sum(result.params["a"] == 0)) == int(jnp.sum(~result.masks["a"])) == 7


def spoilt():
    """A model whose gradients are all NaN, though what it predicts is finite."""
    predict = lambda p, x: x @ p["a"] + jnp.sqrt(0 * jnp.sum(p["a"]))
    return flj.Model(predict, GAUSSIAN)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "kfac"])
def test_gradients_that_all_are_nan_are_told(name):
    params, (x, _) = problem()
    model = spoilt()
    with pytest.raises(FloatingPointError, match="all 12 gradients of the fit"):
        prune(model, {"a": params["a"]}, MAKERS[name](model), (x, jnp.zeros((12, 4))))


def test_batches_that_all_are_nan_are_told():
    params, (x, _) = problem()
    model = spoilt()
    with pytest.raises(
        FloatingPointError, match="not ready after 0 batches: .*; 9 batches with NaN or infinity"
    ):
        prune(model, {"a": params["a"]}, ALL["fishleg"](model), (x, jnp.zeros((12, 4))))


def test_gradual_pruning_refuses_a_curvature_of_zero():
    """A step can't raise: no mask is extended, and `check` says why."""
    params, batch = problem()
    params = {"a": params["a"], "bias": jnp.ones((3, 2))}
    estimator = ALL["diagonal"](NIL)
    reports = {}
    for prunable in ("^a$", "bias"):
        tx = flj.gradual_prune(estimator, 0.5, prunable=prunable, mask_every=1)
        state = tx.init(params)
        still = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(still, state, params, batch=batch)
        reports[prunable] = flj.check(state), flj.masks(state), updates
    report, masks, updates = reports["^a$"]
    assert report.failures == 1 and not report.ok and report.sparsity == 0
    assert "a curvature that is 0 for every prunable weight" in report.message
    assert masks["a"].all() and not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    report, masks, _ = reports["bias"]
    assert report.ok and int(jnp.sum(~masks["bias"])) == 3


# losses that are not finite


def some_nan():
    """A model whose loss is NaN for the examples with a negative first target."""

    def negative_log_likelihood(outputs, targets):
        values = GAUSSIAN.negative_log_likelihood(outputs, targets)
        return jnp.where(targets[:, 0] < -1e3, jnp.nan, values)

    likelihood = GAUSSIAN._replace(negative_log_likelihood=negative_log_likelihood)
    return flj.Model(lambda p, x: x @ p["a"] @ p["b"], likelihood)


NAN = some_nan()
UNFITTED = flj.inverse.diagonal(NAN)._replace(update=untouchable().update)


@pytest.mark.parametrize(
    "options",
    [
        {"compensation": GROUP()},
        {"compensation": flj.compensation.independent(check_step=True)},
        {"compensation": flj.compensation.independent(first_order=True, check_step=False)},
        {"stages": 2},
    ],
)
def test_a_loss_that_is_not_finite_is_refused_before_the_fit(options):
    params, (x, y) = problem()
    batches = [(x, y), (x, y.at[3].set(-1e4))]
    with pytest.raises(FloatingPointError, match="the loss on batches\\[1\\] is nan"):
        flj.prune_one_shot(NAN, params, UNFITTED, batches, sparsity=0.5, **options)


def test_a_loss_that_is_not_finite_on_held_out_batches_is_refused_before_the_fit():
    params, (x, y) = problem()
    held_out = [(x, y), (x, y.at[3].set(-1e4))]
    with pytest.raises(FloatingPointError, match="the loss on held_out\\[1\\] is nan"):
        prune(NAN, params, UNFITTED, (x, y), held_out=held_out)


def test_a_loss_that_nobody_measures_may_be_what_it_will():
    params, (x, y) = problem()
    options = {"compensation": flj.compensation.independent(), "saliency": "obs"}
    result = prune(NAN, params, ALL["diagonal"](NAN), (x, y.at[3].set(-1e4)), **options)
    assert result.stopped is None and "actual" not in result.stages[0]


def overflowing(above):
    """A model whose outputs overflow once more than so many weights are zero."""

    def predict(params, x):
        zeros = sum(jnp.sum(p == 0) for p in params.values())
        return x @ params["a"] @ params["b"] * jnp.where(zeros > above, 1e30, 1.0)

    return flj.Model(predict, GAUSSIAN)


@pytest.mark.parametrize(
    "compensation",
    [GROUP(), flj.compensation.independent(check_step=True)],
    ids=["group", "single"],
)
def test_losses_that_are_not_finite_whatever_the_step_end_the_pruning(compensation):
    """In the first stage by an error, later with the weights of the stage before."""
    params, batch = problem()
    options = {"stages": flj.Stages(4, schedule="linear"), "compensation": compensation}
    with pytest.raises(FloatingPointError, match="loss of the pruned weights is not finite"):
        prune(overflowing(0), params, flj.inverse.identity(), batch, 0.8, **options)
    result = prune(overflowing(8), params, flj.inverse.identity(), batch, 0.8, **options)
    assert len(result.stages) == 2 and "stage 3 of 4 failed: the loss" in result.stopped
    assert all(math.isfinite(stage["step"]) for stage in result.stages)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "losses, best",
    [
        ([math.nan, 3.0, 2.0, 4.0], 2),
        ([-math.inf, 3.0, math.nan, 4.0], 1),
        ([math.nan] * 4, 3),
        ([math.inf, math.nan, math.inf, -math.inf], 3),
    ],
)
def test_the_lowest_loss_is_a_number(losses, best, traced):
    """And where there is none, the step is the one that changes no kept weight."""
    curvature = flj.Curvature(lambda i: jnp.asarray(losses)[i], None, None)

    def lowest(zero):
        return _independent.lowest_loss(curvature, zero, [0, 1, 2, 3])[0]

    assert int((jax.jit(lowest) if traced else lowest)(jnp.array(0))) == best


def test_a_promise_that_is_nan_decides_on_no_damping():
    """Nor does a loss of NaN: the next damping, whose loss is lower, is taken."""

    def solve(x, raised):
        loss, gain = {1.0: (2.0, math.nan), 4.0: (1.0, 0.5), 16.0: (3.0, 0.5)}[raised]
        return Trial(raised, raised, None, loss, {"ratio": 9.0}, False, gain)

    found = _damping_search.search(solve, None, attempts=3, chosen=True, lower=False)
    assert found.raised == 4.0

    def traced(x, raised):
        loss = jnp.where(raised == 1, jnp.nan, raised)
        return Trial(raised, x, x, loss, {}, jnp.array(True), jnp.ones(()))

    found = _damping_search.search_traced(traced, jnp.ones(()), attempts=3)
    assert float(found.raised) == 4.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_breaks_a_limit(value):
    """Infinity, too, though that is more than any metric that was to be kept."""
    params, batch = problem()

    def metric(weights):
        zeros = sum(int(jnp.sum(w == 0)) for w in jax.tree.leaves(weights))
        return 1.0 if zeros <= limit else value

    target, model = flj.targets.metric(metric, 0.5), overflowing(20)
    limit = 6
    result = prune(model, params, flj.inverse.identity(), batch, target)
    assert sum(int(jnp.sum(~m)) for m in jax.tree.leaves(result.masks)) == 6
    limit = 0
    with pytest.raises(FloatingPointError, match="measure is not finite at a sparsity of"):
        prune(model, params, flj.inverse.identity(), batch, target)


def test_a_trust_that_is_no_number_is_refused():
    """Pruning weights that are zero costs nothing by either half."""
    model = flj.Model(lambda p, x: x @ p["a"], GAUSSIAN)
    params, (x, _) = problem()
    params = {"a": params["a"].at[:2].set(0.0)}
    batches = [(x, None), (x + 1, None)]
    with pytest.raises(FloatingPointError, match="cannot be compared"):
        flj.trust(model, params, flj.inverse.identity(), batches, sparsity=0.5, masks=None)


# estimates that are not ready


def test_too_few_gradients_are_refused_before_anything_is_compiled(monkeypatch):
    params, (x, y) = problem()
    model = flj.Model(lambda p, x: x @ p["a"] @ p["b"], GAUSSIAN)
    estimator = flj.inverse.woodfisher(model, gradients=1000, examples_per_gradient=2)
    fail = untouchable()
    blocked = estimator._replace(init=fail.init, update=fail.update)
    monkeypatch.setattr(flj.pruning.one_shot.checks, "check_model", fail.init)
    message = "give 12 gradients, but the estimator needs 1000: .* set gradients=12"
    with pytest.raises(ValueError, match=message):
        flj.prune_one_shot(model, params, blocked, [(x, y)] * 2, sparsity=0.5)
    with pytest.raises(ValueError, match="of stage 2 give 2 gradients"):
        flj.prune_one_shot(
            model,
            params,
            blocked._replace(gradients=6),
            [(x, y), (x[:4], y[:4])],
            sparsity=0.5,
            stages=flj.Stages(2, batches_per_stage=1),
        )


def test_a_state_that_is_not_ready_is_refused():
    params, (x, y) = problem()
    model = flj.Model(lambda p, x: x @ p["a"] @ p["b"], GAUSSIAN)
    estimator = flj.inverse.woodfisher(model, gradients=24)
    state = flj.fit(estimator, params, [(x, y)], key=jax.random.key(0))  # which may be returned
    with pytest.raises(ValueError, match="not ready after 12 gradients: it needs 24"):
        prune(model, params, estimator, (x, y), stages=flj.Stages(state=state))
    state = jax.jit(estimator.update)(state, params, (x, y), jax.random.key(1))
    options = {"stages": flj.Stages(state=state), "compensation": flj.compensation.none()}
    assert prune(model, params, estimator, (x, y), **options).stopped is None


# other arguments that stand for something else


@pytest.mark.parametrize("name", ALL)
def test_a_function_in_place_of_a_model_is_refused_at_once(name):
    with pytest.raises(ValueError, match="model must be a fishleg_jax.Model, got a function"):
        ALL[name](normalised)
    with pytest.raises(ValueError, match="model must be a fishleg_jax.Model, got 3"):
        ALL[name](3)


@pytest.mark.parametrize("make", ["gradual_prune", "fishleg_prune", "prune"])
@pytest.mark.parametrize("value", [90.0, -0.1, math.nan])
def test_a_schedule_that_leaves_its_range_is_refused(make, value):
    arguments = {
        "gradual_prune": (flj.inverse.identity(),),
        "fishleg_prune": (NIL,),
        "prune": (optax.sgd(0.1), NIL),
    }[make]
    late = lambda step: jnp.where(step < 2000, 0.0, value)
    with pytest.raises(ValueError, match="sparsity must be a fraction in \\[0, 1\\) .* step 10000"):
        getattr(flj, make)(*arguments, late)
    with pytest.raises(ValueError, match="regrow must be a fraction in \\[0, 1\\] .* step 1$"):
        getattr(flj, make)(*arguments, 0.5, regrow=lambda step: value)


def test_a_schedule_that_tends_to_one_is_accepted():
    """In float32 it gets there, long after training."""
    tx = flj.gradual_prune(
        flj.inverse.identity(), lambda step: 1 - 0.999**step, regrow=lambda step: 1.0
    )
    assert int(tx.init(jnp.ones((2, 2))).count) == 0


def test_a_result_in_place_of_masks_is_refused_in_a_sentence():
    params, batch = problem()
    result = prune(TRAINING, params, flj.inverse.identity(), batch)
    with pytest.raises(ValueError, match="got a Result: use its masks, as in .*result.masks"):
        flj.apply_masks(params, result)
    flj.apply_masks(params, result.masks)


def test_structures_that_differ_are_told_by_their_key_paths():
    params = {f"layer_{i}": {"kernel": jnp.ones((2, 2))} for i in range(50)}
    other = {name: value for name, value in params.items() if name != "layer_7"}
    other = other | {f"x{i}": jnp.ones(()) for i in range(5)}
    with pytest.raises(ValueError) as caught:
        flj.apply_masks(params, other)
    expected = "lacks 'layer_7/kernel' and has 'x0', 'x1', 'x2' and 2 more in addition"
    assert str(caught.value) == f"masks must have the structure of the parameters, but {expected}"
    with pytest.raises(ValueError, match="built from other containers, with a tuple at the top"):
        flj.apply_masks([jnp.ones(2)], (jnp.ones(2, bool),))
