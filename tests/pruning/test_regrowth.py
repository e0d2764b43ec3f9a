"""Weights that come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests.pruning.training import MAGNITUDE, STEPS

# the first of eight weights is what matters, and starts as the smallest
TARGET = jnp.array([[3.0], [0.1], [0.1], [0.1], [1.0], [1.0], [0.1], [0.1]])
START = {"w": jnp.array([[0.01], [0.5], [0.6], [0.7], [0.8], [0.9], [0.4], [0.3]])}
LINEAR = flj.Model(lambda params, x: x @ params["w"], flj.likelihoods.gaussian())
SCHEDULE = flj.schedules.cubic(0.5, begin=0, end=30)


# at rest up to the first mask update
OPTIMISER = optax.sgd(lambda count: jnp.where(count < 5, 0.0, 0.05))


def run(tx=None, hand_in=False, **options):
    """Training towards the target, with masks at every step."""
    if tx is None:
        pruning = flj.gradual_prune(MAGNITUDE, model=LINEAR, mask_every=5, prunable="w", **options)
        tx = optax.chain(OPTIMISER, pruning)
    inputs = jax.random.normal(jax.random.key(0), (STEPS, 64, 8))

    def step(carry, x):
        params, state = carry
        batch = x, x @ TARGET
        grads = jax.grad(lambda p: flj.loss(LINEAR, p, batch))(params)
        extra = {"grad": grads} if hand_in else {"batch": batch}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["w"][:, 0], flj.masks(state)["w"][:, 0])

    (_, state), (path, masks) = jax.lax.scan(step, (START, tx.init(START)), inputs)
    return np.asarray(path), np.asarray(masks), flj.check(state)


def test_a_weight_that_was_pruned_too_early_comes_back():
    path, masks, report = run(sparsity=SCHEDULE, regrow=0.5)
    without, stays, _ = run(sparsity=SCHEDULE)
    assert not masks[4, 0] and not stays[4:, 0].any()
    back = 1 + np.flatnonzero(~masks[:-1, 0] & masks[1:, 0])[0]
    assert path[back - 1, 0] == 0.0 and path[back, 0] > 0.5 and masks[back:, 0].all()
    assert path[-1, 0] > 2 and abs(without[-1, 0]) == 0
    # as many go for it, so that it is the schedule's number all the same
    np.testing.assert_array_equal((~masks).sum(1), (~stays).sum(1))
    assert (~masks[-1]).sum() == 4 and report.ok
    assert (path[~masks] == 0.0).all()


def test_a_function_of_the_step_goes_on_where_the_sparsity_stands_still():
    regrow = lambda step: jnp.where(step < 35, 0.5, 0.0)
    path, masks, report = run(sparsity=0.5, regrow=regrow)
    assert ((~masks).sum(1) == 4).all() and report.ok
    assert not masks[0, 0] and masks[-1, 0] and (path[~masks] == 0.0).all()
    changed = 2 + np.flatnonzero((masks[1:] != masks[:-1]).any(axis=1))
    assert len(changed) and (changed % 5 == 0).all() and changed.max() < 35
    constant, _, _ = run(sparsity=0.5, regrow=0.5)
    assert abs(constant[-1, 0]) == 0  # a number counts where the sparsity rises


@pytest.mark.parametrize("value", [float("nan"), 7.0, -0.1])
def test_a_share_that_is_none_is_counted_and_nothing_comes_back(value):
    share = lambda step: jnp.where((step > 1) & (step < 50), value, 0.0)  # beyond those looked at
    tx = flj.gradual_prune(MAGNITUDE, 0.5, prunable="w", regrow=share, mask_every=2)
    params = {"w": jnp.arange(1.0, 9)[:, None]}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params, grad=params)
        params = optax.apply_updates(params, updates)
    found = flj.check(state)
    assert found.failures == 3 and not found.ok and flj.sparsity(params, "w") == 0.5


def test_nothing_comes_back_for_nothing():
    """Weights without updates stay where they are, however many were to come back."""
    tx = flj.gradual_prune(MAGNITUDE, SCHEDULE, prunable="w", regrow=1.0, mask_every=5)
    params = {"w": jnp.arange(1.0, 9)[:, None]}

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, grad=grad)
        return (optax.apply_updates(params, updates), state), flj.masks(state)["w"][:, 0]

    grads = {"w": jnp.zeros((STEPS, 8, 1))}
    (_, state), masks = jax.lax.scan(step, (params, tx.init(params)), grads)
    np.testing.assert_array_equal(masks[-1], np.arange(8) >= 4)
    assert not (masks[1:] & ~masks[:-1]).any() and flj.check(state).ok


@pytest.mark.parametrize("saliency", ["obs", lambda params, *_: params["w"] ** 2])
def test_a_gradient_that_is_not_finite_is_refused(saliency):
    """Where an estimate says by the gradient which weights come back."""
    estimator = flj.inverse.diagonal(LINEAR, labels="empirical")
    tx = flj.gradual_prune(
        estimator, SCHEDULE, prunable="w", regrow=1.0, mask_every=5, saliency=saliency
    )
    inputs = jax.random.normal(jax.random.key(0), (64, 8))
    batch, params = (inputs, inputs @ TARGET), START
    state, update = tx.init(START), jax.jit(tx.update)
    for i in range(STEPS):
        grads = {"w": jnp.zeros((8, 1)).at[0].set(jnp.nan if i == 9 else 0.0)}
        still = jax.tree.map(jnp.zeros_like, params)
        updates, state = update(still, state, params, batch=batch, grad=grads)
        params = optax.apply_updates(params, updates)
    assert flj.check(state).failures == 1 and flj.check(state).sparsity == 0.5


@pytest.mark.parametrize("saliency", ["auto", "magnitude", "function"])
def test_returns_do_not_depend_on_the_unit_of_the_inputs(saliency):
    """Gradients and weights have different units, so that neither competes with the other."""

    def masks_at(unit):
        square = lambda params, *_: jax.tree.map(jnp.square, params)
        tx = optax.chain(
            optax.sgd(lambda count: jnp.where(count < 5, 0.0, 0.05 / unit**2)),
            flj.gradual_prune(
                flj.inverse.diagonal(LINEAR, 1e-3 * unit**2),
                SCHEDULE,
                mask_every=5,
                prunable="w",
                regrow=0.5,
                saliency=square if saliency == "function" else saliency,
                compensation=flj.compensation.none(),
            ),
        )
        params = {"w": START["w"] / unit}

        def step(carry, x):
            params, state = carry
            batch = x, x @ (TARGET / unit)
            grads = jax.grad(lambda p: flj.loss(LINEAR, p, batch))(params)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), flj.masks(state)["w"][:, 0]

        inputs = unit * jax.random.normal(jax.random.key(0), (STEPS, 64, 8))
        return np.asarray(jax.lax.scan(step, (params, tx.init(params)), inputs)[1])

    masks = masks_at(1.0)
    assert (masks[1:] & ~masks[:-1]).any()
    np.testing.assert_array_equal(masks_at(1 / 16), masks)


def test_the_gradient_is_of_the_batch_or_handed_in_or_known_to_the_wrapper():
    path, masks, _ = run(sparsity=SCHEDULE, regrow=0.5)
    wrapper = flj.prune(
        OPTIMISER, LINEAR, SCHEDULE, estimator=MAGNITUDE, mask_every=5, regrow=0.5, prunable="w"
    )
    for other, other_masks, report in (
        run(sparsity=SCHEDULE, regrow=0.5, hand_in=True),
        run(wrapper, hand_in=True),
        run(wrapper),
    ):
        np.testing.assert_array_equal(other_masks, masks)
        np.testing.assert_allclose(other, path, rtol=1e-5, atol=1e-6)
        assert report.ok
    estimator = flj.inverse.diagonal(LINEAR)
    without = flj.gradual_prune(estimator, 0.5, prunable="w", regrow=0.5, saliency="obs")
    with pytest.raises(ValueError, match="regrow needs the gradient: pass it"):
        without.update(START, without.init(START), START, assimilate=False)
