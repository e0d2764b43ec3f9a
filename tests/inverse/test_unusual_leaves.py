"""Leaves without weights, and leaves with names that states have too, through all estimators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._assimilation import _skipped
from fishleg_jax.inverse._kronecker.units import make_units
from tests import dense

pytestmark = pytest.mark.slow

fishleg = functools.partial(flj.inverse.fishleg, learn=True, start=2, updates=4)
ESTIMATORS = {
    "fishleg": flj.inverse.fishleg,
    "fishleg, learning": fishleg,
    "fishleg, full": functools.partial(fishleg, factors=factors.full),
    "fishleg, block_diagonal": functools.partial(
        fishleg, damping=0.1, factors=factors.block_diagonal, cap=5
    ),
    "fishleg, kronecker": functools.partial(
        fishleg, damping=0.1, factors={"k|e": factors.kronecker}, cap=2
    ),
    "fishleg, joined": functools.partial(fishleg, damping=0.1, join_bias=True),
    "woodfisher": lambda model: flj.inverse.woodfisher(model, 0.1, gradients=12, block_size=None),
    "woodfisher, blocks": lambda model: flj.inverse.woodfisher(
        model, 0.1, gradients=12, block_size=5
    ),
    "mfac": lambda model: flj.inverse.mfac(model, 0.1, window=8, examples_per_gradient=2),
    "mfac, leaves": lambda model: flj.inverse.mfac(model, 0.1, window=12, block_size="leaf"),
    "mfac, blocks": lambda model: flj.inverse.mfac(model, 0.1, window=12, block_size=5),
    "kfac": lambda model: flj.inverse.kfac(model, 0.1),
    "diagonal": lambda model: flj.inverse.diagonal(model, 0.1),
}
# a training step takes long to compile: one of each kind
GRADUAL = ("fishleg", "woodfisher", "mfac, leaves", "kfac", "diagonal")
estimators = pytest.mark.parametrize("name", ESTIMATORS)
KEY = jax.random.key(0)


def gradual(model, estimator, params, batch, steps=6):
    """Weights and state of a gradual pruning to a half."""
    tx = optax.chain(
        optax.sgd(0.01),
        flj.fishleg_prune(model, 0.5, estimator=estimator, aux_every=1, mask_every=2),
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: flj.loss(model, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@functools.cache
def fitted(name):
    """One run of each pruning for all that is looked at; None for those that are not run."""

    def predict(p, x):
        empty = x[:, :0] @ p["count"]["in"] + p["masks"]["out"].sum()
        return jnp.tanh(x @ p["skipped"]) @ p["value"] + p["all"] + empty

    model = flj.Model(predict, flj.likelihoods.categorical())
    keys = jax.random.split(KEY, 3)
    params = {
        "skipped": jax.random.normal(keys[0], (4, 3)),
        "value": jax.random.normal(keys[1], (3, 3)),
        "all": jnp.zeros(3),
        "count": {"in": jnp.zeros((0, 3)), "guard": jnp.zeros(0)},
        "masks": {"out": jnp.zeros((3, 0)), "damping": jnp.zeros(0)},
    }
    batch = (jax.random.normal(keys[2], (12, 4)), jnp.arange(12) % 3)
    estimator = ESTIMATORS[name](model)
    result = flj.prune_one_shot(model, params, estimator, [batch], sparsity=0.5, key=KEY)
    run = gradual(model, estimator, params, batch) if name in GRADUAL else None
    return estimator, params, result, run


def number_pruned(masks):
    return sum(int((~m).sum()) for m in jax.tree.leaves(masks))


@estimators
def test_leaves_without_weights_and_with_names_of_states(name):
    """Kernels of no inputs and of no outputs; keys that states and their parts have, too."""
    estimator, params, result, run = fitted(name)
    assert number_pruned(result.masks) == 10  # of 21
    if run is not None:
        pruned, state = run
        assert number_pruned(flj.masks(state)) == 10
        assert flj.check(state).ok, flj.check(state)
        assert np.isfinite(dense.ravel(pruned)).all()
    for function in (estimator.multiply, estimator.diagonal):
        tree = dense.jitted(function)(result.state, params)
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, params)
        assert np.isfinite(dense.ravel(tree)).all()


@pytest.mark.parametrize("name", ["fishleg", "mfac, leaves", "diagonal"])
def test_gradients_that_are_left_out_are_still_counted(name):
    """As failures of a gradual pruning, by the state's own field."""
    estimator, params, result, _ = fitted(name)
    skipped = result.state.guard if name == "fishleg" else result.state
    assert _skipped(result.state) == skipped.skipped == 0
    broken = jnp.full((12, 4), jnp.nan), jnp.arange(12) % 3
    after = jax.jit(estimator.update)(result.state, params, broken, KEY)
    assert _skipped(after) == (1 if name == "fishleg" else 12)


@pytest.mark.parametrize("join_bias", [False, True])
def test_units_without_weights(join_bias):
    """Each is diagonal whatever was asked for, and goes into its place and out of it."""
    params = {"kernel": jnp.zeros((3, 0)), "bias": jnp.zeros(0)}
    leaves = jax.tree.leaves(params)
    for unit in make_units(params, factors.full, join_bias, 2):
        assert unit.factor == factors.diagonal(unit.pack(leaves).shape)
        unit.unpack(unit.pack(leaves), leaves)
        assert [x.shape for x in leaves] == [(0,), (3, 0)]
