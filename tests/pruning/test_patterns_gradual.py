"""Patterns in gradual pruning: groups go whole, masks never shrink, nothing comes back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax import _tiles
from tests import dense

STEPS, EXAMPLES = 240, 8
N_M = flj.patterns.n_m(2, 4)
COUPLED = flj.patterns.units([[("Dense_0/kernel", 1), ("Dense_1/kernel", 0)]])
MODEL = flj.Model(dense.mlp, flj.likelihoods.categorical())


@functools.cache
def problem():
    params = dense.mlp_params(jax.random.key(0), (9, 24, 3), "float32")
    x = jax.random.normal(jax.random.key(1), (STEPS, EXAMPLES, 9))
    return params, (x, jnp.argmax(x[..., :3], axis=-1))


def trained(sparsity, estimator=None, **options):
    """Weights, masks of all steps, weights of all steps, and the state."""
    pruning = flj.fishleg_prune(
        MODEL,
        sparsity,
        estimator=estimator,
        **({"mask_every": 10, "aux_every": 10, "saliency": "obs"} | options),
    )
    tx = optax.chain(optax.adam(0.02), pruning)
    params, data = problem()

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        kernels = lambda tree: [tree[f"Dense_{i}"]["kernel"] for i in range(2)]
        return (params, state), (kernels(flj.masks(state)), kernels(params))

    start = params, tx.init(params)
    (_, state), (masks, weights) = jax.jit(lambda c: jax.lax.scan(step, c, data))(start)
    return [np.asarray(m) for m in masks], [np.asarray(w) for w in weights], state


def check_all(masks, weights, state, least):
    """What every pruning keeps to, step by step."""
    assert flj.check(state).ok
    for mask, weight in zip(masks, weights, strict=True):
        assert not (mask[1:] & ~mask[:-1]).any()  # masks never shrink
        assert (weight[~mask] == 0).all()  # and no weight comes back
    counts = sum((~m).reshape(STEPS, -1).sum(axis=1) for m in masks)
    assert len(set(counts)) > least
    return counts


def rising(final):
    """Linear, so that masks are extended about twenty times."""
    return lambda step: final * jnp.clip((step - 35) / 200, 0, 1)


@pytest.mark.parametrize("estimator", ["identity", "fishleg"])
def test_more_groups_are_at_n_of_m_until_all_are(estimator):
    estimator = flj.inverse.identity() if estimator == "identity" else None
    masks, weights, state = trained(rising(0.5), estimator, pattern=N_M)
    counts = check_all(masks, weights, state, 18)
    # 8 of the 9 inputs and all hidden units lie in groups of four
    assert counts[-1] == 2 * (2 * 24 + 6 * 3)
    for mask in masks:
        kept = _tiles.split(mask, (1, 4, 1)).sum(axis=-1)
        assert set(np.unique(kept)) <= {2, 4} and (kept[-1] == 2).all()


def test_coupled_units_go_one_by_one():
    masks, weights, state = trained(rising(0.7), pattern=COUPLED)
    counts = check_all(masks, weights, state, 12)
    first, second = masks[0].any(axis=1), masks[1].any(axis=2)
    assert (first == second).all()
    assert (masks[0] == first[:, None, :]).all() and (masks[1] == second[:, :, None]).all()
    assert counts[-1] == 12 * (int(0.7 * 288) // 12)


def test_none_prunes_to_the_pattern_at_once_and_a_number_to_part_of_it():
    for sparsity, expected in ((None, 132), (0.25, 72)):
        masks, weights, state = trained(sparsity, flj.inverse.identity(), pattern=N_M)
        assert flj.check(state).ok and flj.check(state).sparsity == expected / 288
        assert sum((~m[-1]).sum() for m in masks) == expected
        assert (masks[0][0] == masks[0][-1]).all()


def test_erk_has_the_exact_total_at_every_update():
    schedule = rising(0.83)
    masks, weights, state = trained(schedule, flj.inverse.identity(), scope="erk")
    counts = check_all(masks, weights, state, 15)
    assert counts[-1] == int(0.83 * 288)
    for step in range(40, 240, 10):
        parts = round(float(schedule(jnp.int32(step))) * 1e6)
        assert counts[step - 1] == parts * 288 // 1_000_000


def test_devices_on_a_named_axis_agree():
    pruning = lambda axis: flj.gradual_prune(
        flj.inverse.fishleg(MODEL, start=4, axis_name=axis),
        flj.schedules.cubic(0.5, begin=4, end=16),
        model=MODEL,
        pattern=N_M,
        saliency="mixture",
        mask_every=3,
        aux_every=3,
        axis_name=axis,
    )
    params, data = problem()
    data = jax.tree.map(lambda x: x[:18], data)

    def run(axis, data):
        tx = optax.chain(optax.sgd(0.1), pruning(axis))

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)
            grads = grads if axis is None else jax.lax.pmean(grads, axis)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, tx.init(params)), data)
        return carry

    halves = jax.tree.map(lambda x: x.reshape(18, 2, 4, *x.shape[2:]).swapaxes(0, 1), data)
    both, state = jax.jit(jax.vmap(lambda d: run("devices", d), axis_name="devices"))(halves)
    for mask, weight in zip(*map(jax.tree.leaves, (flj.masks(state), both)), strict=True):
        np.testing.assert_array_equal(mask[0], mask[1])
        np.testing.assert_array_equal(weight[0], weight[1])
    kept = _tiles.split(flj.masks(state)["Dense_1"]["kernel"][0], (4, 1)).sum(axis=-1)
    assert (kept == 2).all()


@pytest.mark.parametrize(
    "sparsity, options, words",
    [
        (flj.schedules.cubic(0.6, begin=1, end=9), {"pattern": N_M}, "at most 0.5"),
        (0.6, {"pattern": N_M}, "at most 0.4"),
        (0.5, {"pattern": N_M, "regrow": 0.1}, "no weight comes back alone"),
        (None, {}, "None, which"),
        (0.5, {"pattern": "units"}, "one of flj.patterns"),
        (0.5, {"scope": {}}, "scope must be"),
    ],
)
def test_what_a_pattern_cannot_meet_is_refused(sparsity, options, words):
    with pytest.raises(ValueError, match=words):
        flj.gradual_prune(flj.inverse.identity(), sparsity, **options).init(problem()[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"pattern": flj.patterns.blocks((3, 3))},
        {"scope": {"a": 0.3, "b": 0.6}},
    ],
    ids=["blocks", "densities"],
)
def test_a_schedule_that_ends_out_of_reach_is_refused(arguments):
    params = {"a": jnp.ones((10, 14)), "b": jnp.ones((14, 5))}
    tx = flj.gradual_prune(
        flj.inverse.identity(), flj.schedules.cubic(0.9, begin=1, end=9), masks=None, **arguments
    )
    with pytest.raises(ValueError, match="sparsity must be"):
        tx.init(params)
    with pytest.raises(ValueError, match="sparsity must be"):
        jax.jit(tx.init)(params)


def test_densities_of_leaves_that_are_not_pruned_are_refused():
    scores = {"w": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match="'bias' must match a prunable leaf"):
        flj.make_masks(scores, scope={"bias": 0.5})


@pytest.mark.parametrize("couplings", [[[("w", 1), ("w", -1)]], [[("w", 1)], [("w", -1)]]])
def test_couplings_that_name_an_axis_twice_are_refused(couplings):
    scores = {"w": jnp.ones((4, 4))}
    pattern = flj.patterns.units(couplings)
    with pytest.raises(ValueError, match="name axis 1 of 'w' once"):
        flj.make_masks(scores, 0.5, pattern=pattern)
