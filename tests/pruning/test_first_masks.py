"""Pruning what is sparse already: its zeros stay, and count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import dense

MODEL = flj.Model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], flj.likelihoods.gaussian())
MAGNITUDE = flj.inverse.identity()
DAMPING = 0.05
EXAMPLES = 40


def problem(key, zeros=8):
    """Weights of which the lowest of `a` are zero, and a batch with labels."""
    params = dense.random_like(key, {"a": jnp.ones((5, 4)), "b": jnp.ones((4, 3))})
    if zeros:
        params["a"] = flj.apply_masks(params["a"], flj.make_masks(abs(params["a"]), zeros / 20))
    x = jax.random.normal(jax.random.key(1), (EXAMPLES, 5), params["a"].dtype)
    y = jax.random.normal(jax.random.key(2), (EXAMPLES, 3), params["a"].dtype)
    return params, (x, y)


def estimates():
    options = {"damping": DAMPING}
    return {
        "woodfisher": flj.inverse.woodfisher(MODEL, gradients=EXAMPLES, **options),
        "mfac": flj.inverse.mfac(MODEL, window=EXAMPLES, **options),
    }


@pytest.mark.parametrize("name", ["woodfisher", "mfac"])
@pytest.mark.parametrize("prunable", ["b", "a|b"])
def test_zeros_of_before_stay_and_the_rest_is_the_surgeon_on_the_kept_weights(
    x64, key, name, prunable
):
    """By dense algebra: scores and corrections of the inverse of F_KK, K what is not zero."""
    params, batch = problem(key)
    weights, kept = dense.ravel(params), dense.ravel(params) != 0
    rows = dense.gradients(MODEL, params, batch)[:, kept]
    inverse = np.linalg.inv(rows.T @ rows / EXAMPLES + DAMPING * np.eye(kept.sum()))
    scores = np.full(len(weights), np.inf)
    scores[kept] = weights[kept] ** 2 / (2 * np.diag(inverse))
    leaf = np.repeat([True, True] if "a" in prunable else [False, True], [20, 12])
    ranked = np.where(~leaf, np.inf, np.where(kept, scores, -1))
    count = 16 if "a" in prunable else 6
    new = kept.copy()
    new[np.argsort(ranked, kind="stable")[:count]] = False
    gone = (kept & ~new)[kept]
    delta = -inverse @ np.where(gone, weights[kept] / np.diag(inverse), 0)
    expected = np.zeros(len(weights))
    expected[kept] = np.where(gone, 0, weights[kept] + delta)

    result = flj.prune_one_shot(
        MODEL,
        params,
        estimates()[name],
        [batch],
        sparsity=0.5,
        prunable=prunable,
        stages=1,
        held_out=None,
        compensation=flj.compensation.independent(),
    )
    np.testing.assert_array_equal(dense.ravel(result.masks), new)
    np.testing.assert_allclose(dense.ravel(result.params), expected, atol=1e-9)


def test_one_leaf_after_the_other_and_one_scope_after_the_other(key):
    params, batch = problem(key, zeros=0)
    estimator = flj.inverse.diagonal(MODEL)
    prune = lambda params, **options: flj.prune_one_shot(
        MODEL, params, estimator, [batch], compensation=flj.compensation.group(), **options
    )
    first = prune(params, sparsity=0.4, prunable="a")
    second = prune(first.params, sparsity=0.5, prunable="b")
    assert bool(jnp.all(second.params["a"][~first.masks["a"]] == 0))
    assert flj.sparsity(second.params["a"]) == 0.4 and flj.sparsity(second.params["b"]) == 0.5
    whole = prune(params, sparsity=0.5)
    layer = prune(whole.params, sparsity=0.55, scope="layer")
    assert all(
        jax.tree.leaves(jax.tree.map(lambda n, o: bool(jnp.all(o | ~n)), layer.masks, whole.masks))
    )
    # stages go on from what there is
    later = prune(whole.params, sparsity=0.75, stages=flj.Stages(2, schedule="linear"))
    assert [s["sparsity"] for s in later.stages] == [0.625, 0.75]
    assert int(jnp.sum(later.params["a"] == 0) + jnp.sum(later.params["b"] == 0)) == 24


@pytest.mark.parametrize(
    "target", [flj.targets.weights(10), flj.targets.bytes(40), flj.targets.loss_increase(1e9)]
)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("stages", [1, 2])
def test_targets_count_zeros_of_before(key, target, scope, stages):
    params, batch = problem(key)
    result = flj.prune_one_shot(
        MODEL, params, MAGNITUDE, [batch], sparsity=target, scope=scope, stages=stages
    )
    assert bool(jnp.all(result.params["a"][params["a"] == 0] == 0))
    assert sum(int(jnp.sum(~m)) for m in jax.tree.leaves(result.masks)) >= 20


def test_masks_that_are_given_count_and_none_starts_anew(key):
    params, batch = problem(key)
    prune = lambda **options: flj.prune_one_shot(
        MODEL, params, MAGNITUDE, [batch], sparsity=0.5, prunable="a", **options
    )
    given = {"a": jnp.arange(20).reshape(5, 4) % 2 == 0, "b": jnp.ones((4, 3), bool)}
    exactly = prune(masks=given)
    np.testing.assert_array_equal(exactly.masks["a"], given["a"])
    anew = prune(masks=None, compensation=flj.compensation.none())
    assert flj.sparsity(anew.params["a"]) == 0.5
    for masks, message in (
        ("ones", "masks must be 'zeros', None or a pytree of booleans, got 'ones'"),
        ({"a": given["a"]}, "masks must have the structure"),
        (jax.tree.map(lambda m: m.astype(jnp.float32), given), "masks must be booleans"),
        (jax.tree.map(lambda m: m[:2], given), "masks: 'a' must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(masks=masks)
        with pytest.raises(ValueError, match=message):
            flj.gradual_prune(MAGNITUDE, 0.5, masks=masks).init(params)


def test_fewer_zeros_than_there_are_can_not_be_asked_for(key):
    params, batch = problem(key)
    for options in ({}, {"scope": "layer"}, {"stages": 3}):
        with pytest.raises(
            ValueError, match="masks already prune 8 weights, but .* requests only 6"
        ):
            flj.prune_one_shot(MODEL, params, MAGNITUDE, [batch], sparsity=0.2, **options)


def test_leaves_and_layers_of_zeros_only_are_not_trained_yet():
    params = {"a": jnp.zeros((5, 4)), "b": jnp.ones((4, 3)).at[0, 0].set(0)}
    with pytest.warns(UserWarning, match=r"held at zero: b \(1\); pass masks=None"):
        state = flj.gradual_prune(MAGNITUDE, 0.5).init(params)
    assert bool(state.masks["a"].all()) and state.pruned.tolist() == [1]
    stack = {"layers": jnp.ones((3, 4, 5)).at[1].set(0).at[2, 0, 0].set(0)}
    with pytest.warns(UserWarning, match=r"layers \(1\)"):
        state = flj.gradual_prune(MAGNITUDE, 0.5, prunable=flj.Leaves(stacked="layers")).init(stack)
    assert int(jnp.sum(~state.masks["layers"])) == 1


@pytest.mark.filterwarnings("ignore:weights that are zero now")
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_gradual_pruning_starts_from_the_zeros(key, scope):
    params, _ = problem(key, zeros=10)
    schedule = flj.schedules.cubic(0.75, begin=0, end=20)
    tx = optax.chain(
        optax.sgd(0.1), flj.gradual_prune(MAGNITUDE, schedule, scope=scope, mask_every=5)
    )

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), sum(jnp.sum(p == 0) for p in params.values())

    grads = jax.tree.map(lambda p: jnp.ones((30, *p.shape)), params)
    (end, state), zeros = jax.lax.scan(step, (params, tx.init(params)), grads)
    assert zeros[0] == 10 and bool(jnp.all(jnp.diff(zeros) >= 0)) and zeros[-1] == 24
    assert bool(jnp.all(end["a"][params["a"] == 0] == 0)) and flj.check(state).ok


def test_masks_can_be_handed_to_a_chain_before_they_are_applied(key):
    params, _ = problem(key, zeros=0)
    masks = flj.make_masks(jax.tree.map(abs, params), 0.5)
    tx = flj.gradual_prune(MAGNITUDE, 0.5, masks=masks)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, moved, flj.apply_masks(params, masks))
    assert flj.check(state).ok and flj.check(state).sparsity == 0.5


def test_the_report_says_what_was_left_out_and_what_was_zero_before(key):
    params, batch = problem(key)
    whole = params | {"bias": jnp.ones(3)}
    model = flj.Model(lambda p, x: MODEL.predict(p, x) + p["bias"], flj.likelihoods.gaussian())
    report = flj.prune_one_shot(model, whole, MAGNITUDE, [batch], sparsity=0.5).report
    first, second = str(report).splitlines()[:2]
    assert first == "Left out (bias): 1 leaf, 3 weights: bias"
    assert second == "Pruned before and held: 8 weights: a (8); masks=None frees them"
    assert report.to_dict()["started"] == [{"name": "a", "zeros": 8}]
    assert report.to_dict()["left_out"] == [{"name": "bias", "shape": [3], "reason": "bias"}]
    assert "Pruned before and held" in report._repr_html_()


def test_trust_does_not_count_what_both_halves_had_pruned_before(key):
    """Half of the weights are zero; of the others the halves agree on as many as by chance."""
    params, (x, y) = problem(key, zeros=10)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    found = flj.trust(MODEL, params, flj.inverse.identity(), batches, sparsity=0.6)
    assert found.agreement == 1  # magnitudes are the same for both
    mask = {"a": jnp.ones((5, 4), bool), "b": jnp.ones((4, 3), bool)}
    one, other = (
        [m.at[0].set(False) if i == k else m for i, m in enumerate(mask.values())] for k in (0, 1)
    )
    from fishleg_jax.pruning.trust import _agreement

    assert _agreement(list(mask.values()), one, one) == 1
    assert _agreement(list(mask.values()), one, other) < 0
