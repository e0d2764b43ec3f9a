"""Constants that are made anew for the pruned weights, such as batch-norm statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj


def predict(params, inputs, constants):
    hidden = (inputs @ params["first"] - constants["mean"]) / constants["deviation"]
    return jax.nn.relu(hidden) @ params["second"]


MODEL = flj.Model(predict, flj.likelihoods.categorical())


def statistics(params, batches):
    """The statistics of the hidden units on the batches' inputs, which predictions subtract."""
    hidden = jnp.concatenate([batch[0] for batch in batches]) @ params["first"]
    return {"mean": hidden.mean(axis=0), "deviation": hidden.std(axis=0) + 1e-3}


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": jax.random.normal(keys[0], (6, 5)),
        "second": jax.random.normal(keys[1], (5, 3)),
    }
    inputs = jax.random.normal(keys[2], (4, 20, 6)) + 1
    labels = jax.random.randint(keys[3], (4, 20), 0, 3)
    constants = statistics(params, [(x,) for x in inputs])
    return params, [(x, y, constants) for x, y in zip(inputs, labels, strict=True)]


DIAGONAL = flj.inverse.diagonal(MODEL, damping=1e-2)  # one for all, that it compiles once


def prune(params, batches, **more):
    return flj.prune_one_shot(
        MODEL, params, DIAGONAL, batches, sparsity=0.6, **more, key=jax.random.key(1)
    )


@pytest.fixture(scope="module")
def whole(case):
    """A pruning in three stages whose constants are all finite."""
    return prune(*case, stages=flj.Stages(3, recalibrate=statistics))


def test_stages_after_the_first_see_constants_of_the_weights_before_them(case):
    params, batches = case
    calls, seen = [], []

    def recalibrate(weights, stage_batches):
        calls.append((weights, stage_batches))
        return statistics(weights, stage_batches)

    keep = flj.compensation.none()

    def spy(weights, old, new, curvature, estimator, state):
        seen.append((weights, float(curvature.check(weights))))
        return keep(weights, old, new, curvature, estimator, state)

    train, held_out = batches[:3], batches[3:]
    result = prune(
        params,
        train,
        compensation=spy,
        saliency="obs",
        held_out=held_out,
        stages=flj.Stages(3, batches_per_stage=1, recalibrate=recalibrate),
    )
    constants = [batches[0][2]] + [statistics(w, b) for w, b in calls[:2]]
    for (weights, loss), now in zip(seen, constants, strict=True):
        expected = float(flj.loss(MODEL, weights, (*held_out[0][:2], now)))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert [b[0][0].tolist() for _, b in calls] == [b[0].tolist() for b in train]
    last = statistics(result.params, [train[2]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result.constants, last)


def test_without_it_there_are_no_constants_and_the_batches_own_stay(case):
    assert prune(*case).constants is None


def test_constants_of_another_make_are_refused(case):
    with pytest.raises(ValueError, match="recalibrate must return constants with the shapes"):
        prune(
            *case, stages=flj.Stages(2, recalibrate=lambda params, batches: {"mean": jnp.zeros(5)})
        )


@pytest.mark.parametrize("calls", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_constants_that_are_not_finite_end_a_pruning(case, whole, calls):
    """With the weights of the stage after which they were made."""
    made = []

    def recalibrate(params, batches):
        made.append(None)
        constants = statistics(params, batches)
        return jax.tree.map(lambda c: c * jnp.nan, constants) if len(made) >= calls else constants

    result = prune(*case, stages=flj.Stages(3, recalibrate=recalibrate))
    assert len(result.stages) == calls
    assert result.stages == whole.stages[:calls]
    assert "recalibrate returned NaN or infinity at" in result.stopped
    assert result.stopped in str(result.report)
    assert result.constants is None
    assert flj.sparsity(result.params) == pytest.approx(result.stages[-1]["sparsity"], abs=0.05)


def test_batches_need_constants():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    with pytest.raises(ValueError, match="recalibrate needs batches with constants"):
        flj.prune_one_shot(
            model,
            jnp.ones((2, 2)),
            flj.inverse.identity(),
            [(jnp.ones((1, 2)), None)],
            sparsity=0.5,
            stages=flj.Stages(recalibrate=lambda params, batches: None),
        )
