"""Stages of the group update: fresh data for each, steps checked on held-out data, damping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning.compensation import _damping_search as damping_search
from fishleg_jax.pruning.compensation import _group_solve
from fishleg_jax.pruning.compensation._damping_search import Trial
from fishleg_jax.pruning.one_shot import run
from tests import dense
from tests.pruning.test_stages import MODEL, problem

GROUP = flj.compensation.group()
DIAGONAL = flj.inverse.diagonal(MODEL, 1e-2)  # one for all, that it compiles once


def prune(key, batches=4, **options):
    params, data = problem(key, batches=batches)
    defaults = {"sparsity": 0.7, "stages": 3, "compensation": GROUP}
    return params, data, flj.prune_one_shot(MODEL, params, DIAGONAL, data, **defaults | options)


def test_every_stage_has_batches_of_its_own(key, monkeypatch):
    seen = []
    fit = run.fitted

    def noting(estimator, params, batches, *others):
        seen.append([float(b[0][0, 0]) for b in batches])
        return fit(estimator, params, batches, *others)

    monkeypatch.setattr(run, "fitted", noting)
    _, data, _ = prune(key, stages=flj.Stages(3, batches_per_stage=2))
    first = [float(b[0][0, 0]) for b in data]
    assert seen == [first[:2], first[2:], first[:2]]  # and around again


def test_held_out_data_decides_on_the_step(key):
    params, data = problem(key)
    held_out = [dense.classification_batch(jax.random.key(7), 30)]
    result = flj.prune_one_shot(
        MODEL, params, DIAGONAL, data, sparsity=0.7, stages=2, compensation=GROUP, held_out=held_out
    )
    loss = flj.curvature(MODEL, held_out).loss
    before = float(loss(params))
    for stage in result.stages:
        assert stage["step"] == flj.compensation.STEPS[int(np.argmin(stage["losses"]))]
        before += stage["held_out"]
    assert float(loss(result.params)) == pytest.approx(before, rel=1e-5)


def test_the_group_update_beats_single_corrections(key):
    """On the curvature's own data, in the median of several networks."""
    gains = []
    for seed in range(3):
        losses = []
        for compensation in (flj.compensation.independent(), GROUP):
            _, data, result = prune(
                jax.random.fold_in(key, seed), stages=1, compensation=compensation
            )
            losses.append(float(flj.curvature(MODEL, data).loss(result.params)))
            assert flj.sparsity(result.params) == int(0.7 * 36) / 36
        gains.append(losses[0] - losses[1])
    assert np.median(gains) > 0


def search(losses, *, ratio=0.0, long=(), chosen=True, lower=True, attempts=3):
    """Which damping is found, and which were tried, where each has a loss and gains 1."""
    tried = []

    def solve(x, raised):
        assert x in (None, *tried)
        tried.append(raised)
        return Trial(raised, raised, None, losses[raised], {"ratio": ratio}, raised in long, 1.0)

    found = damping_search.search(solve, None, attempts=attempts, chosen=chosen, lower=lower)
    return found.raised, tried


def test_a_damping_is_not_changed_for_noise():
    flat = {1024.0: 2.0, 0.25: 1.95, 1.0: 2.0, 4.0: 1.95, 16.0: 2.05, 64.0: 1.0, 256.0: 0.8}
    assert search(flat) == (1.0, [1.0, 0.25, 4.0])
    assert search(flat, ratio=3.0, lower=False) == (1.0, [1.0, 4.0, 16.0])
    # but gone through where it is far too small
    found = search(flat, ratio=3.0, lower=False, attempts=9)
    assert found == (256.0, [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0])


VALLEY = {0.0625: 3.0, 0.25: 1.0, 1.0: 2.0, 4.0: 1.5, 16.0: 5.0}


@pytest.mark.parametrize("ratio", [0.0, 3.0, float("nan")])
def test_a_held_out_loss_decides_alone(ratio):
    assert search(VALLEY, ratio=ratio) == (0.25, [1.0, 0.25, 0.0625])
    assert search(VALLEY, ratio=ratio, attempts=2) == (0.25, [1.0, 0.25])
    peak = VALLEY | {0.25: 9.0}
    assert search(peak, ratio=ratio, attempts=4) == (4.0, [1.0, 0.25, 4.0, 16.0])  # and up again


def test_without_it_a_damping_is_raised_where_the_prediction_was_poor():
    assert search(VALLEY, lower=False) == (1.0, [1.0])
    assert search(VALLEY, chosen=False) == (1.0, [1.0])
    assert search(VALLEY, ratio=3.0, lower=False) == (4.0, [1.0, 4.0, 16.0])
    assert search(VALLEY, ratio=float("nan"), lower=False) == (4.0, [1.0, 4.0, 16.0])
    assert search(VALLEY, ratio=3.0, chosen=False) == (1.0, [1.0])
    assert search(VALLEY | {4.0: 9.0}, ratio=3.0, lower=False) == (1.0, [1.0, 4.0])


def test_a_damping_is_raised_until_the_step_is_not_too_long():
    assert search(VALLEY, long=(1.0,), lower=False) == (4.0, [1.0, 4.0])
    assert search(VALLEY, long=(1.0, 4.0), chosen=False) == (4.0, [1.0, 4.0, 16.0])
    assert search(VALLEY, long=(1.0, 4.0, 16.0), attempts=1) == (1.0, [1.0])


def test_a_damping_that_is_far_too_small_is_left(monkeypatch):
    """At the minimum of a network's loss, which is far from quadratic where much is pruned."""
    keys = jax.random.split(jax.random.key(0), 4)
    model = flj.Model(lambda w, x: jnp.tanh(x @ w[0]) @ w[1], flj.likelihoods.categorical())
    params = [jax.random.normal(k, s) for k, s in zip(keys, ((6, 8), (8, 3)), strict=False)]
    inputs = jax.random.normal(keys[2], (64, 6))
    batches = [(inputs, jax.random.categorical(keys[3], model.predict(params, inputs)))]
    curvature = flj.curvature(model, batches)
    old = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    new = flj.make_masks(jax.tree.map(jnp.abs, params), 0.6)
    estimator = flj.inverse.diagonal(model, 1e-6)
    state = flj.fit(estimator, params, batches, key=keys[3])
    monkeypatch.setattr(_group_solve, "RELATIVE_DAMPING", 1e-5)
    one, found = (
        flj.compensation.group(attempts=attempts)(params, old, new, curvature, estimator, state)[1]
        for attempts in (1, 12)
    )
    assert one["step"] < 1
    assert found["damping"] > 1e-4
    assert min(found["losses"]) < min(one["losses"]) - 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"stages": flj.Stages(batches_per_stage=0)},
            "batches_per_stage must be .* from 1 to 4, .* got 0",
        ),
        (
            {"stages": flj.Stages(batches_per_stage=5)},
            "batches_per_stage must be .* from 1 to 4, .* got 5",
        ),
        ({"held_out": []}, "held_out is empty"),
        (
            {"stages": flj.Stages(batches_per_stage=1.5)},
            "batches_per_stage must be .* from 1 to 4, .* got 1.5",
        ),
    ],
)
def test_bad_arguments(key, options, message):
    with pytest.raises(ValueError, match=message):
        prune(key, **options)


def test_a_solve_whose_full_step_is_best_is_not_made_again(key):
    """Where the loss is the quadratic model itself, at a damping that was given."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    params, inputs = jax.random.normal(key, (6, 2)), jax.random.normal(key, (30, 6))
    curvature = flj.curvature(model, [(inputs, inputs @ params)])
    measured = []

    def loss(weights):
        measured.append(weights)
        return curvature.loss(weights)

    masks = [jnp.ones((6, 2), bool), jnp.ones((6, 2), bool).at[2:4].set(False)]
    _, info = flj.compensation.group(damping=1e-6)(
        params, *masks, curvature._replace(loss=loss), flj.inverse.identity(), ()
    )
    assert info["step"] == 1.0 and info["ratio"] < 0.1
    assert len(measured) == 5  # four steps, and none of it
