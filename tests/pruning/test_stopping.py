"""Prunings that end before they are where they should go, and what stages tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests.pruning.test_targets import IDENTITY, MODEL, NONE, problem, prune, pruned


def broken(function, after):
    """An identity whose function gives NaN once more than so many weights are pruned."""

    def call(state, tree, mask=None):
        zeros = sum(jnp.sum(~m) for m in jax.tree.leaves(mask))
        bad = jnp.where(zeros > after, jnp.nan, 1.0)
        return jax.tree.map(lambda x: x * bad, getattr(IDENTITY, function)(state, tree, mask))

    return IDENTITY._replace(
        **{function: call},
        init=lambda params: {"fits": jnp.zeros(())},
        update=lambda state, params, batch, key, mask=None: {
            "fits": sum(jnp.sum(p == 0) for p in jax.tree.leaves(params)) * 1.0
        },
        updates=1,
    )


@pytest.mark.parametrize(
    "function, what",
    [
        ("diagonal", "the diagonal of the inverse Fisher, or the scores from it,"),
        ("multiply", "the compensated weights"),
    ],
)
def test_a_stage_that_breaks_leaves_the_weights_of_the_one_before(function, what):
    params, batches = problem()
    options = {
        "compensation": flj.compensation.independent(),
        "stages": flj.Stages(3, schedule="linear"),
    }
    result = prune(params, batches, 0.75, broken(function, 10), **options)
    assert [s["sparsity"] for s in result.stages] == [0.25, 0.5]
    assert pruned(result) == 20 and result.state == {"fits": 10}  # fitted before that stage
    for w, m in zip(jax.tree.leaves(result.params), jax.tree.leaves(result.masks), strict=True):
        np.testing.assert_array_equal(w != 0, m)
    assert result.stopped.startswith(f"stage 3 of 3 failed: {what} has NaN")
    assert result.stopped.endswith("at a sparsity of 0.5")
    assert "\n3 " not in str(result.report) and "Stopped: stage 3" in str(result.report)
    with pytest.raises(FloatingPointError, match=what):
        prune(params, batches, 0.75, broken(function, -1), **options)


def test_a_loss_that_is_not_finite_ends_the_pruning():
    """And where it never was finite, there is none."""

    def predict(p, x):
        zeros = jnp.sum(p["a"] == 0)
        return MODEL.predict(p, x) + jnp.where(zeros > 10, 1e30, 0.0)

    params, batches = problem()
    model = flj.Model(predict, MODEL.likelihood)
    estimator = IDENTITY._replace(updates=1)
    options = {"sparsity": 0.8, "stages": flj.Stages(4, schedule="linear"), "compensation": NONE}
    options["prunable"] = "a|b"
    result = flj.prune_one_shot(model, params, estimator, batches, **options)
    assert "the loss of the pruned weights is not finite" in result.stopped
    assert len(result.stages) < 4 and int(jnp.sum(result.params["a"] == 0)) <= 10
    assert all(np.isfinite(s["actual"]) for s in result.stages)
    endless = [(batches[0][0], batches[0][1] + 1e30)]
    with pytest.raises(FloatingPointError, match="the loss on batches\\[0\\] is inf before"):
        flj.prune_one_shot(model, params, estimator, endless, **options)


def test_a_limit_goes_around_sparsities_that_break():
    """In one stage what is not finite at high sparsities is only a limit reached."""
    params, batches = problem()

    def compensate(params, old_mask, new_mask, *others):
        delta, info = NONE(params, old_mask, new_mask, *others)
        zeros = sum(jnp.sum(~m) for m in jax.tree.leaves(new_mask))
        return jax.tree.map(lambda d: jnp.where(zeros > 25, jnp.nan, d), delta), info

    target = flj.targets.loss_increase(1e6)
    result = prune(params, batches, target, compensation=compensate)
    assert pruned(result) == 25 and result.stopped is None
    with pytest.raises(FloatingPointError, match="the compensated weights"):
        prune(
            params,
            batches,
            target,
            compensation=lambda p, *others: (jax.tree.map(lambda x: x * jnp.nan, p), {}),
        )


def test_stages_tell_what_was_predicted_and_what_came():
    """The identity is exact here but for its unit."""
    params, batches = problem()
    estimator = IDENTITY._replace(updates=1)
    result = prune(params, batches, 0.8, estimator, stages=3)
    assert len(result.stages) == 3
    for stage in result.stages:
        assert stage["actual"] == pytest.approx(stage["predicted"] / 10, rel=1e-4)
    table = str(result.report).split("\n\n")[1].splitlines()
    assert table[0].split() == ["stage", "sparsity", "predicted", "actual"] and len(table) == 5
    assert float(table[-1].split()[3]) == pytest.approx(result.stages[-1]["actual"], rel=1e-2)
