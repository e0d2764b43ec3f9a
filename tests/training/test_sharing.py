"""Training and pruning with one estimate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.training.state import natural_state
from tests.training.problems import (
    DIAGONAL,
    LINEAR,
    RATE,
    at,
    batches,
    gradient,
    initial,
    lowered,
    train,
)

STEPS = 24
SCHEDULE = flj.schedules.cubic(0.5, begin=4, end=16)
DATA = batches(STEPS)


def prune(estimator):
    return flj.fishleg_prune(LINEAR, SCHEDULE, estimator=estimator, mask_every=4)


def optimizer(**options):
    plain = {"aux_every": 2, "damping": None, "max_fisher_norm": None}
    return flj.fishleg_optimizer(LINEAR, RATE, estimator=DIAGONAL, **plain, **options)


@functools.cache
def trained():
    """Weights and state after all steps."""
    return train(optimizer(prune=prune), data=DATA)[:2]


def test_training_prunes_to_the_schedules_sparsity_with_the_optimisers_estimate():
    params, state = trained()
    assert (np.asarray(params["w"]) == 0).sum() == 6 and flj.sparsity(params) == 0.5
    assert flj.check(state).ok and lowered(params, DATA) < 0.6
    # the estimate is kept once, and so are its batches
    assert state.pruning.estimate == ()
    assert int(natural_state(state).assimilated) == 1 + STEPS // 2
    # pruned weights are no part of the Fisher from then on, nor of directions
    pruned = np.asarray(~flj.masks(state)["w"])
    batch = at(0, DATA)
    updates, _ = optimizer(prune=prune).update(
        gradient(params, batch), state, params, batch=batch, assimilate=False
    )
    assert (np.asarray(updates["w"])[pruned] == 0).all()


def test_the_masks_are_those_of_the_same_estimate_elsewhere():
    """A pruning that is given the optimiser's estimate scores as one with that state would."""
    _, state = trained()
    state = state._replace(  # before any weight is pruned, at a step at which some are
        pruning=state.pruning._replace(
            count=jnp.full_like(state.pruning.count, 15),
            pruned=jnp.zeros_like(state.pruning.pruned),
            masks=jax.tree.map(jnp.ones_like, state.pruning.masks),
        )
    )
    params, batch = initial(), at(3, DATA)
    grads = gradient(params, batch)
    _, after = optimizer(prune=prune).update(grads, state, params, batch=batch)
    alone = prune(DIAGONAL)
    moved, stepped = optimizer().update(grads, state.optimizer, params, batch=batch)
    own = state.pruning._replace(
        estimate=natural_state(stepped).estimate, assimilated=natural_state(stepped).assimilated
    )
    _, expected = alone.update(moved, own, params, batch=batch, assimilate=False)
    for one, other in zip(
        jax.tree.leaves(after.pruning.masks), jax.tree.leaves(expected.masks), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert flj.sparsity(jax.tree.map(lambda m: m * 1.0, after.pruning.masks)) == 0.5


def test_without_pruning_the_step_is_the_chains():
    tx = optax.chain(
        flj.scale_by_inverse_fisher(DIAGONAL, aux_every=2),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(RATE),
    )
    expected, _, _ = train(tx)
    found, _, _ = train(optimizer(weight_decay=0.1))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_held_steps_keep_zeros():
    params, state = trained()
    grads = gradient(params, at(0, DATA))
    updates, after = optimizer(prune=prune).update(grads, state, params, hold=True)
    params = optax.apply_updates(params, updates)
    assert flj.sparsity(params) == 0.5 and flj.check(after).ok


def test_what_is_no_pruning_is_refused():
    with pytest.raises(ValueError, match="prune must be a function such as lambda shared"):
        optimizer(prune=prune(DIAGONAL))
    with pytest.raises(ValueError, match="prune: its result must be an optax transformation"):
        optimizer(prune=lambda estimator: None)
    with pytest.raises(ValueError, match="prune must return fishleg_prune or gradual_prune"):
        optimizer(prune=lambda estimator: optax.identity()).init(initial())
