"""Stages of the group update: fresh data for each, steps checked on held-out data, damping."""

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning import _walk, one_shot
from tests import dense
from tests.pruning.test_stages import MODEL, problem

GROUP = flj.compensation.group()
DIAGONAL = flj.inverse.diagonal(MODEL, 1e-2)  # one for all, that it compiles once


def prune(key, batches=4, **options):
    params, data = problem(key, batches=batches)
    defaults = {"sparsity": 0.7, "stages": 3, "compensation": GROUP}
    return params, data, flj.prune_one_shot(
        MODEL, params, DIAGONAL, data, **defaults | options
    )  # fmt: skip


def test_every_stage_has_batches_of_its_own(key, monkeypatch):
    seen = []
    fit = one_shot.fit

    def noting(estimator, params, batches, **options):
        seen.append([float(b[0][0, 0]) for b in batches])
        return fit(estimator, params, batches, **options)

    monkeypatch.setattr(one_shot, "fit", noting)
    _, data, _ = prune(key, stages=3, batches_per_stage=2)
    first = [float(b[0][0, 0]) for b in data]
    assert seen == [first[:2], first[2:], first[:2]]  # and around again


def test_held_out_data_decides_on_the_step(key):
    params, data = problem(key)
    held_out = [dense.classification_batch(jax.random.key(7), 30)]
    result = flj.prune_one_shot(
        MODEL, params, DIAGONAL, data, sparsity=0.7, stages=2,
        compensation=GROUP, held_out=held_out,
    )  # fmt: skip
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


def test_the_damping_follows_the_errors_of_the_prediction():
    adapted = lambda ratio, raised=1.0: _walk.adapted({"ratio": ratio, "raised": raised})
    assert adapted(0.05) == 0.5
    assert adapted(0.2) == 1.0
    assert adapted(3.0) == 2.0
    assert adapted(float("nan")) == 2.0
    assert adapted(0.05, raised=4.0) == 4.0


def test_a_stage_takes_over_the_damping(key):
    _, _, result = prune(key, adapt_damping=True, stages=4)
    dampings = [stage["damping"] for stage in result.stages]
    for before, after, stage in zip(dampings, dampings[1:], result.stages, strict=False):
        grown = after / before  # by what the rule says, and by what the next stage had to raise
        assert grown == pytest.approx(2.0 ** round(np.log2(grown)), rel=1e-4)
        if stage["ratio"] > _walk.POOR:
            assert grown >= 2 - 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches_per_stage": 0}, "batches_per_stage must be from 1 to 4, .* got 0"),
        ({"batches_per_stage": 5}, "batches_per_stage must be from 1 to 4, .* got 5"),
        ({"held_out": []}, "held_out is empty"),
        (
            {"adapt_damping": True, "compensation": flj.compensation.independent()},
            "adapt_damping needs compensation.group",
        ),
        (
            {"adapt_damping": True, "compensation": flj.compensation.group(damping=0.1)},
            "without a damping of its own",
        ),
        ({"batches_per_stage": 1.5}, "batches_per_stage must be from 1 to 4, .* got 1.5"),
    ],
)
def test_bad_arguments(key, options, message):
    with pytest.raises(ValueError, match=message):
        prune(key, **options)


def test_a_damping_that_the_program_chose_is_never_below_the_estimates_own(key):
    _, _, result = prune(key, stages=6)
    _, _, fixed = prune(key, stages=6, adapt_damping=False)
    for stage in result.stages:
        assert stage["damping"] >= 1e-2 * (1 - 1e-6)
    for stage in fixed.stages:
        assert stage["damping"] == pytest.approx(1e-2 * stage["raised"])
    # where nothing had to be raised and all was predicted well, adapting changes nothing
    _, _, both_ways = prune(key, stages=6, adapt_damping=True)
    assert min(stage["damping"] for stage in both_ways.stages) < 1e-2
