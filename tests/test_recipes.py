"""Recipes: gradual pruning in the training loops that people have, whole and to be copied."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import fishleg_jax as flj
from experiments.gradual.train_state import PruningTrainState

STEPS, FEATURES, CLASSES = 60, 5, 3
SPARSITY = flj.schedules.cubic(0.6, begin=36, end=56)
LIKELIHOOD = flj.likelihoods.categorical()


def chain(model):
    """An optimiser that prunes, with an estimate that compiles in less time than FishLeg's."""
    estimator = flj.inverse.diagonal(model)
    return optax.chain(
        optax.adam(1e-2), flj.fishleg_prune(model, SPARSITY, mask_every=5, estimator=estimator)
    )


def batches():
    """Images and labels, stacked: a batch for each step."""
    inputs = jax.random.normal(jax.random.key(1), (STEPS, 64, FEATURES))
    labels = (inputs @ jax.random.normal(jax.random.key(2), (FEATURES, CLASSES))).argmax(-1)
    return inputs, labels


def kernels(params):
    return [x for x in jax.tree.leaves(params) if x.ndim == 2]


def assert_pruned(params, state, model, batch):
    weights = sum(x.size for x in kernels(params))
    zeros = sum(int((x == 0).sum()) for x in kernels(params))
    assert zeros == 6 * weights // 10
    assert flj.check(state).ok
    jax.tree.map(lambda x, m: np.testing.assert_array_equal(x[~m], 0), params, flj.masks(state))
    assert float(flj.loss(model, params, batch)) < 0.9 * np.log(CLASSES)  # it has learned too


def predict(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"] + params["bias"]


MODEL = flj.Model(predict, LIKELIHOOD)
TX = optax.chain(optax.adam(1e-2), flj.fishleg_prune(MODEL, SPARSITY, mask_every=5))


def start():
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": jax.random.normal(keys[0], (FEATURES, 8)) / FEATURES**0.5,
        "out": jax.random.normal(keys[1], (8, CLASSES)) / 8**0.5,
        "bias": jnp.zeros(CLASSES),
    }


def step(carry, batch):
    params, state = carry
    loss, grads = jax.value_and_grad(partial(flj.loss, MODEL))(params, batch)
    updates, state = TX.update(grads, state, params, batch=batch)
    return (optax.apply_updates(params, updates), state), loss


@pytest.fixture(scope="module")
def looped():
    """Weights and state of a plain loop."""
    params = start()
    carry, compiled = (params, TX.init(params)), jax.jit(step)
    for batch in zip(*batches(), strict=True):
        carry, _ = compiled(carry, batch)
    assert compiled._cache_size() == 1
    return carry


def test_a_plain_loop(looped):
    batch = jax.tree.map(lambda x: x[-1], batches())
    assert_pruned(*looped, MODEL, batch)


def test_a_scan_over_steps(looped):
    params = start()
    carry, losses = jax.jit(lambda c, b: jax.lax.scan(step, c, b))(
        (params, TX.init(params)), batches()
    )
    assert losses.shape == (STEPS,)
    assert_pruned(*carry, MODEL, jax.tree.map(lambda x: x[-1], batches()))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), carry[0], looped[0])


class Net(nn.Module):
    """The same network in flax linen."""

    @nn.compact
    def __call__(self, x):
        """Logits."""
        return nn.Dense(CLASSES)(jnp.tanh(nn.Dense(8)(x)))


def linen(state_class):
    net = Net()
    model = flj.Model(lambda params, x: net.apply({"params": params}, x), LIKELIHOOD)
    tx = chain(model)
    params = net.init(jax.random.key(0), jnp.zeros((1, FEATURES)))["params"]
    return model, state_class.create(apply_fn=net.apply, params=params, tx=tx)


def test_flax_linen():
    model, state = linen(PruningTrainState)

    @jax.jit
    def train_step(state, batch):
        grads = jax.grad(partial(flj.loss, model))(state.params, batch)
        return state.apply_gradients(grads=grads, batch=batch)

    for batch in zip(*batches(), strict=True):
        state = train_step(state, batch)
    assert int(state.step) == STEPS
    assert_pruned(state.params, state.opt_state, model, batch)


def test_the_train_state_of_flax_drops_the_batch_and_is_told_so():
    """The refusal names what the library has instead, and that is there."""
    _, state = linen(train_state.TrainState)
    with pytest.raises(ValueError, match="batch must be passed to update") as refusal:
        state.apply_gradients(grads=state.params)
    named = re.findall(r"flj\.(\w+)", str(refusal.value))
    assert named == ["TrainStateMixin", "MultiSteps"] and all(hasattr(flj, n) for n in named)


def test_multi_steps_in_a_chain_drop_the_batch_and_are_told_so():
    """Those of optax, whose transformation takes no extra arguments; those of the library do."""
    params = start()
    batch = jax.tree.map(lambda x: x[0], batches())
    tx = optax.chain(flj.MultiSteps(chain(MODEL), 2).gradient_transformation())
    tx.update(params, tx.init(params), params, batch=batch)
    tx = optax.chain(optax.MultiSteps(chain(MODEL), 2).gradient_transformation())
    with pytest.raises(ValueError, match="optax.MultiSteps by flj.MultiSteps"):
        tx.update(params, tx.init(params), params, batch=batch)


def test_the_train_state_hands_on_further_arguments_and_replaces_fields():
    _, state = linen(PruningTrainState)
    batch = jax.tree.map(lambda x: x[0], batches())
    with pytest.raises(ValueError, match="assimilate must be None or False if hold"):
        state.apply_gradients(
            grads=state.params, batch=batch, extra_args={"hold": True, "assimilate": True}
        )
    held = state.apply_gradients(grads=state.params, extra_args={"hold": True}, apply_fn=None)
    assert held.apply_fn is None and held.tx is state.tx and type(held) is PruningTrainState
    assert int(held.step) == int(flj.check(held.opt_state).message.split(" after ")[1][0]) == 1
    plain = PruningTrainState.create(apply_fn=None, params=state.params, tx=optax.sgd(0.1))
    stepped = plain.apply_gradients(grads=plain.params, batch=batch)  # nothing takes the batch
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, 0.9 * y, rtol=1e-6), stepped.params, plain.params
    )


class NnxNet(nnx.Module):
    """The same network in flax NNX."""

    def __init__(self, rngs):
        """Random weights."""
        self.hidden = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.out = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        return self.out(jnp.tanh(self.hidden(x)))


def test_flax_nnx():
    net = NnxNet(nnx.Rngs(0))
    graph, _ = nnx.split(net)
    model = flj.Model(lambda params, x: nnx.merge(graph, params)(x), LIKELIHOOD)
    optimizer = nnx.Optimizer(net, chain(model), wrt=nnx.Param)

    @nnx.jit
    def train_step(net, optimizer, batch):
        inputs, labels = batch
        grads = nnx.grad(
            lambda net: LIKELIHOOD.negative_log_likelihood(net(inputs), labels).mean()
        )(net)
        optimizer.update(net, grads, batch=batch)

    for batch in zip(*batches(), strict=True):
        train_step(net, optimizer, batch)
    params = nnx.state(net, nnx.Param)
    assert int(optimizer.step[...]) == STEPS
    assert_pruned(nnx.as_pure(params), nnx.as_pure(optimizer.opt_state), model, batch)
