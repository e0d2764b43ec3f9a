"""The wrapper around an optimiser, which keeps pruned weights out of its norms and moments."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests.pruning.training import CUBIC, DIAGONAL, MODEL, ZEROS, at, batches, initial, train, zeros

OPTIONS = {"estimator": DIAGONAL, "aux_every": 3, "mask_every": 4}


def wrapped(inner):
    return flj.prune(inner, MODEL, CUBIC, **OPTIONS)


INNER = {
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.05, momentum=0.9)),
    "clip_after": optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.1)),
    "lamb": optax.lamb(0.02),
}


@pytest.mark.parametrize("name", INNER)
def test_gradients_of_pruned_weights_reach_no_kept_weight(name):
    """By norms of which they would be a part; the last in a chain can't prevent it."""
    options = {"sparsity": 0.5, "estimator": flj.inverse.identity()}
    params = initial()
    small = jax.tree.map(lambda p: 0.1 * jnp.sign(p), params)

    def updates(tx, scale):
        update, state = jax.jit(tx.update), tx.init(params)
        _, state = update(small, state, params)
        kept = flj.masks(state)
        assert (~kept["w"]).sum() == 6
        gradients = jax.tree.map(lambda g, m: jnp.where(m, g, scale), small, kept)
        for _ in range(2):  # by the first into moments
            out, state = update(gradients, state, flj.apply_masks(params, kept))
        return jax.tree.leaves(flj.apply_masks(out, kept))

    wrapped = flj.prune(INNER[name], MODEL, **options)
    chained = optax.chain(INNER[name], flj.fishleg_prune(MODEL, **options))
    for tx, same in ((wrapped, True), (chained, False)):
        pairs = zip(updates(tx, 0.0), updates(tx, 1e3), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(0.02),
        optax.sgd(0.02, momentum=0.9),
        optax.masked(optax.adam(0.02), {"w": True, "b": False}),
    ],
    ids=["adamw", "momentum", "masked"],
)
def test_what_the_optimiser_keeps_of_pruned_weights_is_zero(inner):
    params, state, (path, masks) = train(wrapped(inner))
    kept = np.asarray(flj.masks(state)["w"])
    moments = [x for x in jax.tree.leaves(state.inner) if x.shape == (4, 3)]
    assert moments and all((np.asarray(x)[~kept] == 0).all() for x in moments)
    assert all((np.asarray(x)[kept] != 0).all() for x in moments)
    assert (zeros(masks)[29:] == ZEROS).all() and flj.check(state).ok
    assert (np.asarray(path["w"])[~np.asarray(masks["w"])] == 0.0).all()
    assert flj.sparsity(params) == ZEROS / 12


def test_schedule_free_inside_hands_out_zeros():
    """What it averages is put to zero as well."""
    tx = wrapped(optax.contrib.schedule_free(optax.sgd(0.02), 0.02))
    params, state, _ = train(tx)
    handed_out = optax.contrib.schedule_free_eval_params(state.inner, params)
    np.testing.assert_array_equal(handed_out["w"] != 0, flj.masks(state)["w"])
    assert flj.check(state).ok


def test_options_by_name_for_help_and_for_inject_hyperparams():
    assert "mask_every" in inspect.signature(flj.prune).parameters
    make = optax.inject_hyperparams(flj.prune, static_args=("mask_every", "aux_every", "seed"))
    tx = make(optax.sgd(0.02), MODEL, sparsity=CUBIC, estimator=DIAGONAL, mask_every=4)
    _, state, (_, masks) = train(tx)
    assert zeros(masks)[-1] == ZEROS and flj.check(state).ok


@pytest.mark.parametrize("arguments", [(3, 2), (optax.sgd(0.1), 0), (optax.sgd(0.1), 1.5)])
def test_mini_steps_that_are_none(arguments):
    with pytest.raises(ValueError, match="(opt|every_k_schedule) must be"):
        flj.MultiSteps(*arguments)


def test_what_the_wrapper_is_handed():
    tx = wrapped(optax.adam(0.1))
    params = initial()
    with pytest.raises(ValueError, match="params must be passed to update"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="batch must be passed to update"):
        tx.update(params, tx.init(params), params)


def test_extra_arguments_reach_the_optimiser():
    """A line search needs the loss."""
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    tx = wrapped(inner)
    params, batch = initial(), at(0, batches())
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(5):
        _, state = update(params, state, params, batch=batch, value=jnp.float32(1.0))
    assert float(state.inner[1].scale) < 1
