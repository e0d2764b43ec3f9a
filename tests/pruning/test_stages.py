"""Stages, the gradient's part, the step and its check, costs and trust, on small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests import dense
from tests.pruning.test_compensation import any_inverse

MODEL = dense.categorical_mlp()


def problem(key, dtype=None, batches=2):
    params = dense.mlp_params(key, (3, 6, 3), dtype)
    keys = jax.random.split(key, batches)
    return params, [dense.classification_batch(k, 12, dtype=dtype) for k in keys]


def mean_gradient(params, batches):
    return np.mean([dense.gradients(MODEL, params, b).mean(axis=0) for b in batches], axis=0)


def everything(params):
    return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


def some(params, key):
    return jax.tree.map(
        lambda p: jax.random.bernoulli(key, 0.6, p.shape) if p.ndim > 1 else p == p, params
    )


def test_first_order_compensation_is_the_formula(x64, key):
    """`−Q (g + 1_S t / diag Q)` with `t = w − Q g`, and S at zero."""
    params, batches = problem(key, jnp.float64)
    q, estimator = any_inverse(params)
    q = np.asarray(q) * 0.01
    estimator = any_scaled(estimator, 0.01)
    old, new = everything(params), some(params, key)
    correct = flj.compensation.independent(first_order=True, check_step=False)
    curvature = flj.curvature(MODEL, batches)
    delta, info = correct(params, old, new, curvature, estimator, ())
    w, g, kept = dense.ravel(params), mean_gradient(params, batches), dense.ravel(new).astype(bool)
    target = w - q @ g
    expected = -q @ (g + np.where(kept, 0, target / np.diag(q)))
    # the formula itself brings a single pruned weight to zero
    one = np.flatnonzero(~kept)[0]
    single = -q @ (g + target[one] / q[one, one] * np.eye(len(w))[one])
    assert abs(w[one] + single[one]) < 1e-12
    expected[~kept] = -w[~kept]
    np.testing.assert_allclose(dense.ravel(delta), expected, atol=1e-10)
    assert info == {}


def any_scaled(estimator, scale):
    times = lambda tree: jax.tree.map(lambda x: scale * x, tree)
    return estimator._replace(
        multiply=lambda *args: times(estimator.multiply(*args)),
        diagonal=lambda *args: times(estimator.diagonal(*args)),
    )


def test_first_order_scores_are_the_formula(x64, key):
    """And their share of a prune_one_shot: the lowest go."""
    params, batches = problem(key, jnp.float64)
    estimator = flj.inverse.diagonal(MODEL, 0.1, labels="empirical")
    result = flj.prune_one_shot(
        MODEL,
        params,
        estimator,
        batches,
        sparsity=0.5,
        compensation=flj.compensation.independent(first_order=True),
    )
    gradients = np.concatenate([dense.gradients(MODEL, params, b) for b in batches])
    q = 1 / (np.mean(gradients**2, axis=0) + 0.1)
    scores = (dense.ravel(params) - q * mean_gradient(params, batches)) ** 2 / (2 * q)
    prunable = dense.ravel(jax.tree.map(lambda p: jnp.full(p.shape, p.ndim > 1), params))
    scores[~prunable.astype(bool)] = np.inf
    expected = np.ones(len(scores), bool)
    expected[np.argsort(scores)[: int(prunable.sum() * 0.5)]] = False
    np.testing.assert_array_equal(dense.ravel(result.masks).astype(bool), expected)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_scale_goes_from_obd_to_obs(x64, key, scale):
    params, _ = problem(key, jnp.float64)
    _, estimator = any_inverse(params)
    old, new = everything(params), some(params, key)
    deltas = {
        s: dense.ravel(flj.compensation.independent(s)(params, old, new, None, estimator, ())[0])
        for s in (0.0, scale, 1.0)
    }
    kept = dense.ravel(new).astype(bool)
    assert (deltas[0.0][kept] == 0).all()
    np.testing.assert_allclose(deltas[scale][kept], scale * deltas[1.0][kept], atol=1e-12)
    for delta in deltas.values():
        np.testing.assert_array_equal(delta[~kept], -dense.ravel(params)[~kept])


def test_check_of_the_step_keeps_a_destructive_one_from_the_weights(key):
    """An inverse a thousand times too large: without the check it ruins the loss, with it not."""
    params, batches = problem(key)
    estimator = any_scaled(any_inverse(params)[1], 1000.0)
    curvature = flj.curvature(MODEL, batches)
    old, new = everything(params), some(params, key)

    def loss_after(**arguments):
        correct = flj.compensation.independent(first_order=True, **arguments)
        delta, info = correct(params, old, new, curvature, estimator, ())
        return float(curvature.loss(jax.tree.map(jnp.add, params, delta))), info

    unchecked, _ = loss_after(check_step=False)
    checked, info = loss_after()
    pruned_alone = float(curvature.loss(flj.apply_masks(params, new)))
    assert unchecked > 10 * pruned_alone
    assert checked <= pruned_alone * (1 + 1e-6)
    assert info["step"] == 0.0 and len(info["losses"]) == 4


def test_stages_see_the_weights_and_masks_of_those_before(key):
    """Recorded by an estimator that looks on; the end is exactly the sparsity."""
    params, batches = problem(key)
    seen = []

    def update(state, params, batch, key, mask=None):
        jax.debug.callback(
            lambda w, m: seen.append((w, m)),
            params["Dense_0"]["kernel"],
            None if mask is None else mask["Dense_0"]["kernel"],
        )
        return state

    estimator = flj.inverse.identity()._replace(update=update, updates=1)
    result = flj.prune_one_shot(
        MODEL, params, estimator, batches, sparsity=0.7, stages=flj.Stages(3, schedule="linear")
    )
    jax.effects_barrier()
    assert len(seen) == 3
    counts = [int(np.sum(np.asarray(w) == 0)) for w, _ in seen]
    assert counts[0] == 0 < counts[1] < counts[2]
    for w, m in seen[1:]:
        np.testing.assert_array_equal(np.asarray(w) != 0, np.asarray(m))
    assert flj.sparsity(result.params) == int(0.7 * 36) / 36
    assert [round(s["sparsity"], 9) for s in result.stages] == [0.233333333, 0.466666667, 0.7]


def test_stages_of_magnitude_change_nothing(key):
    params, batches = problem(key)
    identity = flj.inverse.identity()
    one, many = (
        flj.prune_one_shot(MODEL, params, identity, batches, sparsity=0.8, stages=n) for n in (1, 5)
    )
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    assert many.report.total.predicted == pytest.approx(one.report.total.predicted, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("woodfisher", marks=pytest.mark.slow),
        pytest.param("mfac", marks=pytest.mark.slow),
        "kfac",
        "diagonal",
    ],
)
def test_every_estimate_prunes_in_stages(key, name):
    params, batches = problem(key)
    make = getattr(flj.inverse, name)
    sizes = {"woodfisher": {"gradients": 24}, "mfac": {"window": 24}}.get(name, {})
    result = flj.prune_one_shot(
        *(MODEL, params, make(MODEL, 0.1, **sizes), batches),
        sparsity=0.6,
        stages=2,
        compensation=flj.compensation.independent(),
    )
    assert flj.sparsity(result.params) == int(0.6 * 36) / 36
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(result.params))


def test_dearer_weights_go_first(key):
    """Costs of a leaf, and of single weights; the report still tells of losses."""
    params, batches = problem(key)
    identity = flj.inverse.identity()

    def pruned(costs):
        result = flj.prune_one_shot(
            MODEL, params, identity, batches, sparsity=0.5, prunable=flj.Leaves(costs=costs)
        )
        return result, [int(jnp.sum(~result.masks[f"Dense_{i}"]["kernel"])) for i in range(2)]

    even = jax.tree.map(lambda p: 1.0, params)
    assert pruned(even)[1] == pruned(None)[1]
    dear = jax.tree_util.tree_map_with_path(
        lambda path, p: 1e9 if "Dense_1" in str(path) else 1.0, params
    )
    assert pruned(dear)[1] == [0, 18]
    single = jax.tree.map(jnp.ones_like, params)
    biggest = jnp.argmax(jnp.abs(params["Dense_0"]["kernel"]))
    single["Dense_0"]["kernel"] = jnp.where(jnp.arange(18) == biggest, 1e9, 1.0).reshape(3, 6)
    result, _ = pruned(single)
    assert not result.masks["Dense_0"]["kernel"].reshape(-1)[biggest]
    removed = jax.tree.map(lambda p, m: jnp.sum(p**2 * ~m) / 2, params, result.masks)
    assert result.report.total.predicted == pytest.approx(
        float(sum(jax.tree.leaves(removed))), rel=1e-5
    )


def test_trust_grows_with_the_data(key):
    """Few examples: halves disagree and a pruning looks cheaper where it was fitted."""
    params, _ = problem(key)

    def measured(estimator, examples):
        found = []
        for seed in range(2):
            keys = jax.random.split(jax.random.key(seed), 2)
            batches = [dense.classification_batch(k, examples) for k in keys]
            found.append(flj.trust(MODEL, params, estimator, batches, sparsity=0.5))
        return np.mean(found, axis=0)

    obd = flj.inverse.diagonal(MODEL, 1e-6, labels="empirical")
    few, many = (measured(obd, n)[0] for n in (2, 72))
    assert few < many <= 1
    few, many = (measured(flj.inverse.mfac(MODEL, 1e-3, window=n), n)[1] for n in (4, 400))
    assert few > 1.5 > many > 0.8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stages": 0}, "stages must be"),
        ({"stages": flj.Stages(schedule="cosine")}, "schedule must be one of"),
        ({"prunable": flj.Leaves(costs=1.0)}, "costs must have the structure of the parameters"),
        ({"stages": flj.Stages(2, state=())}, "state must be None for more than one stage"),
        (
            {"stages": flj.Stages(state=(), on_update=print)},
            "on_update must be None if state is given, .* got the function print",
        ),
        ({"stages": flj.Stages(state=(1.0,))}, "state must be a fitted state .* got tuple"),
    ],
)
def test_bad_arguments(key, arguments, message):
    params, batches = problem(key)
    with pytest.raises(ValueError, match=message):
        flj.prune_one_shot(
            MODEL, params, flj.inverse.identity(), batches, **{"sparsity": 0.5} | arguments
        )


def test_a_result_is_not_a_state(key):
    params, batches = problem(key)
    estimator = flj.inverse.diagonal(MODEL)
    prune = functools.partial(flj.prune_one_shot, MODEL, params, estimator, batches)
    result = prune(sparsity=0.5)
    with pytest.raises(ValueError, match="state must be .*, got a Result: pass result.state"):
        prune(sparsity=0.6, stages=flj.Stages(state=result))
    prune(sparsity=0.6, stages=flj.Stages(state=result.state))


def test_bad_costs_and_scales(key):
    params, batches = problem(key)

    def prune(costs):
        flj.prune_one_shot(
            MODEL,
            params,
            flj.inverse.identity(),
            batches,
            sparsity=0.5,
            prunable=flj.Leaves(costs=costs),
        )

    with pytest.raises(ValueError, match="'Dense_0/kernel' is prunable, so its costs must be pos"):
        prune(jax.tree.map(lambda p: 0.0, params))
    with pytest.raises(ValueError, match="'Dense_0/bias' must be a number or have shape"):
        prune(jax.tree.map(lambda p: jnp.ones(99), params))
    for scale in (-0.1, 1.5, "a", None, True):
        with pytest.raises(ValueError, match="scale must be a number in"):
            flj.compensation.independent(scale)
    with pytest.raises(ValueError, match="batches must contain at least two"):
        flj.trust(MODEL, params, flj.inverse.identity(), batches[:1], sparsity=0.5)
    with pytest.raises(ValueError, match="curvature is needed"):
        flj.compensation.independent(first_order=True)(
            params, everything(params), everything(params), None, flj.inverse.identity(), ()
        )
