"""Pruned weights that go on being updated unseen, and come back by their magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests.pruning.training import DIAGONAL, MAGNITUDE, MODEL, at, batches, gradient, initial

STEPS, WEIGHTS = 40, 12
SCHEDULE = flj.schedules.cubic(0.75, begin=0, end=20)
OPTIMISER = optax.adam(0.1)


def share(step):
    return jnp.where(step < 36, 0.5, 0.0)


def pruning(estimator=MAGNITUDE, **options):
    options = {"regrow": share, "mask_every": 5, "prunable": "w", "aux_every": 5} | options
    return flj.gradual_prune(estimator, SCHEDULE, model=MODEL, **options)


def wrapped(estimator=MAGNITUDE):
    options = {"regrow": share, "mask_every": 5, "prunable": "w"}
    return flj.prune(OPTIMISER, MODEL, SCHEDULE, estimator=estimator, **options)


NO_CHANGE = {"compensation": flj.compensation.none(), "saliency": "magnitude"}
BANDS = flj.bases.by_band(flj.bases.identity(), lambda x: 1 + x, "magnitude")
WAYS = {
    "identity": lambda: optax.chain(OPTIMISER, pruning()),
    "magnitude beside an estimate": lambda: optax.chain(OPTIMISER, pruning(DIAGONAL, **NO_CHANGE)),
    "by band": lambda: optax.chain(OPTIMISER, pruning(DIAGONAL, **NO_CHANGE | {"saliency": BANDS})),
    "wrapper": wrapped,
}


def run(tx, steps=range(1, STEPS + 1), carry=None, dtype=None, **extra):
    """States after every step."""
    data, seen = batches(STEPS, dtype=dtype), []
    if carry is None:
        carry = initial(dtype), tx.init(initial(dtype))

    @jax.jit
    def step(params, state, batch):
        grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, **extra)
        return optax.apply_updates(params, updates), state

    for number in steps:
        carry = step(*carry, at(number - 1, data))
        seen.append(carry)
    assert step._cache_size() == 1
    return seen


def surgery():
    """Dynamic network surgery by its definition: weights, and masks that multiply them."""
    whole, mask = initial(), np.ones((4, 3), bool)
    state, data, pruned, seen, returned = OPTIMISER.init(whole), batches(STEPS), 0, [], 0
    for number in range(1, STEPS + 1):
        used = whole | {"w": whole["w"] * mask}
        updates, state = OPTIMISER.update(gradient(used, at(number - 1, data)), state)
        whole = optax.apply_updates(whole, updates)
        asked = int(np.floor(round(float(SCHEDULE(number)), 6) * WEIGHTS + 1e-9))
        if number % 5 == 0 and (asked > pruned or float(share(number)) > 0):
            size = np.abs(np.asarray(whole["w"]))
            allowed = int(float(share(number)) * pruned)
            lowest = np.sort(np.where(mask, 0, size).ravel())[::-1]
            back = ~mask & (size >= lowest[allowed - 1]) if allowed else np.zeros_like(mask)
            pruned = max(asked, pruned)
            rivals = np.where(mask | back, size, -1)
            new = rivals > np.sort(rivals.ravel())[pruned - 1]
            returned, mask = returned + int((new & ~mask).sum()), new
        seen.append((whole["b"], whole["w"] * mask, mask))
    return seen, returned


@pytest.mark.parametrize("way", WAYS)
def test_it_is_dynamic_network_surgery(x64, way):
    wanted, returned = surgery()
    assert returned > 2
    for (params, state), (bias, weights, mask) in zip(run(WAYS[way]()), wanted, strict=True):
        np.testing.assert_array_equal(flj.masks(state)["w"], mask)
        np.testing.assert_allclose(params["w"], weights, rtol=1e-12)
        np.testing.assert_allclose(params["b"], bias, rtol=1e-12)
        assert (np.asarray(params["w"])[~mask] == 0.0).all()
    report = flj.check(state)
    assert report.ok and report.sparsity == 0.75


def test_only_scores_without_curvature_have_a_shadow():
    diagonal = pruning(DIAGONAL, regrow=None, saliency="magnitude").init(initial())
    assert diagonal.shadow is None
    for saliency in ("auto", "obs", "obd", lambda params, *_: params):
        assert pruning(DIAGONAL, saliency=saliency).init(initial()).shadow is None
    for saliency in ("auto", "obs", "magnitude", BANDS):
        shadow = pruning(saliency=saliency).init(initial()).shadow
        assert shadow["b"] is None and not shadow["w"].any() and shadow["w"].shape == (4, 3)
    # weights that a mask prunes from the start
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), initial())
    masks["w"] = masks["w"].at[0].set(False)
    shadow = pruning(masks=masks).init(initial()).shadow["w"]
    np.testing.assert_array_equal(shadow[0], initial()["w"][0])
    assert not shadow[1:].any()


def test_a_resumed_run_is_the_same_bit_for_bit():
    seen = run(WAYS["identity"]())
    for cut in (7, 13):
        leaves, structure = jax.tree.flatten(seen[cut - 1])
        carry = structure.unflatten(jnp.asarray(np.asarray(x)) for x in leaves)
        rest = run(WAYS["identity"](), range(cut + 1, STEPS + 1), carry)
        jax.tree.map(np.testing.assert_array_equal, rest[-1], seen[-1])


def test_updates_that_are_not_finite_stay_out_of_the_shadow():
    """As long as the weights that they belong to are pruned."""
    tx = pruning(regrow=1.0)
    params = initial()
    state = tx.init(params)
    update = jax.jit(tx.update)

    def go(updates):
        updates, after = update(updates, state, params)
        return optax.apply_updates(params, updates), after

    still = jax.tree.map(jnp.zeros_like, params)
    for _ in range(5):
        params, state = go(still)
    pruned = ~np.asarray(flj.masks(state)["w"])
    assert pruned.sum() > 2
    np.testing.assert_array_equal(state.shadow["w"], np.where(pruned, initial()["w"], 0))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        params, state = go(still | {"w": jnp.where(pruned, bad, 0)})
        np.testing.assert_array_equal(state.shadow["w"], np.where(pruned, initial()["w"], 0))
    # the others go on, and come back
    first = tuple(np.argwhere(pruned)[0])
    grown = still | {"w": jnp.where(pruned, jnp.nan, 0).at[first].set(10.0)}
    params, state = go(grown)
    params, state = go(still)
    assert int(state.count) == 10 and flj.masks(state)["w"][first]
    np.testing.assert_allclose(params["w"][first], initial()["w"][first] + 10.0, rtol=1e-6)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state.shadow)))
    assert flj.check(state).ok


def test_bfloat16():
    seen = run(WAYS["identity"](), dtype=jnp.bfloat16)
    params, state = seen[-1]
    assert state[1].shadow["w"].dtype == params["w"].dtype == jnp.bfloat16
    assert flj.check(state).ok and flj.sparsity(params, "w") == 0.75
    masks = [np.asarray(flj.masks(state)["w"]) for _, state in seen]
    came = sum(int((b & ~a).sum()) for a, b in zip(masks, masks[1:], strict=False))
    assert came > 0
    # a weight that comes back has the value of its shadow, with the update of the step
    for (_, state), (later, _), a, b in zip(seen, seen[1:], masks, masks[1:], strict=False):
        assert (np.asarray(later["w"])[~b] == 0).all()
        assert (np.asarray(state[1].shadow["w"])[a] == 0).all()
        assert (np.asarray(later["w"])[b & ~a] != 0).all()


def test_steps_that_only_hold_and_mini_steps_move_the_shadow_all_the_same():
    tx = WAYS["identity"]()
    whole = run(tx)
    carry, data = (initial(), tx.init(initial())), batches(STEPS)

    def stepped(tx, carry, number, **extra):
        params, state = carry
        batch = at(number - 1, data)
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch, **extra)
        return optax.apply_updates(params, updates), state

    for number in range(1, STEPS + 1):
        carry = jax.jit(stepped, static_argnums=0, static_argnames="hold")(
            tx, carry, number, hold=number % 5 != 0
        )
    np.testing.assert_array_equal(carry[0]["w"] == 0, whole[-1][0]["w"] == 0)
    np.testing.assert_allclose(carry[0]["w"], whole[-1][0]["w"], rtol=1e-5)
    many = flj.MultiSteps(tx, 2).gradient_transformation()
    carry = initial(), many.init(initial())
    jitted = jax.jit(stepped, static_argnums=0)
    for number in range(1, STEPS + 1):
        carry = jitted(many, jitted(many, carry, number), number)
    assert flj.check(carry[1]).ok
    np.testing.assert_array_equal(carry[0]["w"] == 0, whole[-1][0]["w"] == 0)
    np.testing.assert_allclose(carry[0]["w"], whole[-1][0]["w"], rtol=1e-5)


def test_the_natural_gradient_moves_no_shadow():
    def prune(estimator):
        return flj.fishleg_prune(MODEL, 0.5, estimator=estimator, regrow=0.1, saliency="magnitude")

    with pytest.raises(ValueError, match="must not combine regrow with magnitude scores"):
        flj.fishleg_optimizer(MODEL, 0.1, prune=prune).init(initial())
