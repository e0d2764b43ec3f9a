"""Gradual pruning where every device has a batch of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import programs, quick
from tests.pruning.training import (
    CUBIC,
    DIAGONAL,
    MODEL,
    STEPS,
    ZEROS,
    batches,
    gradient,
    initial,
    make_step,
    zeros,
)

GROUP = flj.compensation.group(damping=0.01)


def train_on_two(tx, data):
    """The steps of two devices, each with half of every batch, by `vmap` over a named axis."""
    halves = jax.tree.map(lambda x: x.reshape(STEPS, 2, -1, *x.shape[2:]).swapaxes(0, 1), data)

    def run(data):
        def step(carry, batch):
            params, state = carry
            grads = jax.lax.pmean(gradient(params, batch), "devices")
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), flj.masks(state)["w"]

        return jax.lax.scan(step, (initial(), tx.init(initial())), data)

    return jax.jit(jax.vmap(run, axis_name="devices"))(halves)


@pytest.mark.parametrize("options", [{}, {"compensation": GROUP}], ids=["independent", "group"])
def test_two_devices_are_as_one_with_the_whole_batch(options):
    options = {"estimator": DIAGONAL, "aux_every": 3, "mask_every": 4} | options

    def make(axis_name):
        pruning = flj.fishleg_prune(MODEL, CUBIC, axis_name=axis_name, **options)
        return optax.chain(optax.sgd(0.02), pruning)

    data = batches()
    (params, state), masks = train_on_two(make("devices"), data)
    for leaf in jax.tree.leaves((params, state)):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    tx = make(None)
    (expected, other), (_, single) = jax.jit(lambda c, d: jax.lax.scan(make_step(tx), c, d))(
        (initial(), tx.init(initial())), data
    )
    np.testing.assert_array_equal(masks[0], single["w"])
    np.testing.assert_allclose(params["w"][0], expected["w"], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(
        state[1].estimate.squares["w"][0], other[1].estimate.squares["w"], rtol=1e-4
    )
    assert zeros({"w": masks[0]})[-1] == ZEROS


@pytest.mark.parametrize(
    "options",
    [{}, {"samples": 2}, {"learn": True, "start": 64}],
    ids=["closed form", "parts", "learned"],
)
def test_fishleg_on_two_devices_estimates_the_fisher_of_all(options):
    """Whose batches together have inputs of which each alone has half the directions."""
    estimator = flj.inverse.fishleg(
        MODEL,
        damping=0.05,
        axis_name="devices",
        factors=flj.inverse.factors.full,
        **options,
    )
    # each device's examples are multiples of two unit vectors
    scales = jnp.array([1.0, 0.5, 2.0, 1.5])
    inputs = jnp.tile(jnp.diag(scales).reshape(2, 2, 4), (1, 32, 1))
    params = initial()

    def fit(x):
        def step(i, state):
            return estimator.update(state, params, (x, None), jax.random.key(i))

        return jax.lax.fori_loop(0, 250, step, estimator.init(params))

    state = jax.jit(jax.vmap(fit, axis_name="devices"))(inputs)
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    state = jax.tree.map(lambda x: x[0], state)
    expected = 1 / (scales**2 / 4 + 0.05)
    found = estimator.diagonal(state, params)["w"]
    # what it has not seen would be at 1 / 0.05
    np.testing.assert_allclose(found, jnp.tile(expected[:, None], 3), rtol=0.2)


def test_in_closed_form_each_example_is_processed_on_one_device():
    seen = []

    def predict(params, x):
        jax.debug.callback(lambda x: seen.append(tuple(x.ravel().tolist())), x)
        return MODEL.predict(params, x)

    pruning = flj.fishleg_prune(MODEL._replace(predict=predict), 0.5, axis_name="devices")
    batch = jax.tree.map(lambda x: x[0].reshape(2, -1, *x.shape[2:]), batches())

    def step(batch):
        zero = jax.tree.map(jnp.zeros_like, initial())
        return pruning.update(zero, pruning.init(initial()), initial(), batch=batch)[1]

    assert jax.vmap(step, axis_name="devices")(batch).assimilated.tolist() == [1, 1]
    jax.effects_barrier()
    rows = batch[0].reshape(-1, batch[0].shape[-1]).tolist()
    assert sorted(seen) == sorted(map(tuple, rows))


def test_fishleg_learns_on_each_device_from_its_own_examples():
    seen = []

    def predict(*args):
        seen.append(args[1].shape[0])
        return MODEL.predict(*args)

    pruning = flj.fishleg_prune(
        MODEL._replace(predict=predict), 0.5, axis_name="devices", aux_optimizer=optax.sgd(0.1)
    )
    inputs, targets = jax.tree.map(lambda x: x[0], batches())
    half = len(inputs) // 2
    batch = jax.tree.map(lambda x: x.reshape(2, half, *x.shape[1:]), (inputs, targets))

    def step(batch):
        zero = jax.tree.map(jnp.zeros_like, initial())
        return pruning.update(zero, pruning.init(initial()), initial(), batch=batch)[1]

    jax.eval_shape(jax.vmap(step, axis_name="devices"), batch)
    assert set(seen) == {half}


@pytest.mark.parametrize("name", ["", (), 3, ("devices", 3)])
def test_what_can_be_no_axis_is_refused(name):
    with pytest.raises(ValueError, match="axis_name must be the name of an axis, a tuple of names"):
        flj.fishleg_prune(MODEL, 0.5, axis_name=name)


def test_a_batch_that_is_not_finite_on_one_device_is_refused_on_all():
    pruning = flj.fishleg_prune(MODEL, 0.5, axis_name="devices")
    batch = jax.tree.map(lambda x: jnp.stack([x[0], x[1]]), batches())

    def step(batch):
        zero = jax.tree.map(jnp.zeros_like, initial())
        return pruning.update(zero, pruning.init(initial()), initial(), batch=batch)[1]

    states = jax.jit(jax.vmap(step, axis_name="devices"))
    good, bad = states(batch), states((batch[0].at[1, 0].set(jnp.nan), batch[1]))
    assert good.failures.tolist() == [0, 0] and good.assimilated.tolist() == [1, 1]
    assert bad.failures.tolist() == [1, 1] and bad.assimilated.tolist() == [0, 0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(bad.estimate.moments))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax, fishleg_jax as flj
from jax.sharding import AxisType, PartitionSpec as P
from tests.pruning.training import *
mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
for estimator in (None, DIAGONAL):
    pruning = flj.fishleg_prune(
        MODEL, flj.schedules.cubic(0.7, begin=33, end=38), estimator=estimator, mask_every=2,
        aux_every=2, axis_name="devices",
    )
    tx = optax.chain(optax.sgd(0.02), pruning)
    def run(data):
        def step(carry, batch):
            params, state = carry
            # by weights that all devices share it is summed already
            grads = jax.tree.map(lambda g: g / 2, gradient(params, batch))
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None
        return jax.lax.scan(step, (initial(), tx.init(initial())), data)[0]
    # that what comes out is the same everywhere is what shard_map checks
    spread = jax.shard_map(run, mesh=mesh, in_specs=P(None, "devices"), out_specs=P())
    params, state = jax.jit(spread)(batches())
    assert flj.check(state).ok and flj.sparsity(params) == ZEROS / 12, flj.check(state)
    if estimator is None:
        continue  # FishLeg draws other labels
    single = optax.chain(optax.sgd(0.02), flj.fishleg_prune(
        MODEL, flj.schedules.cubic(0.7, begin=33, end=38), estimator=estimator, mask_every=2,
        aux_every=2,
    ))
    steps = jax.jit(lambda c, d: jax.lax.scan(make_step(single), c, d)[0])
    expected, other = steps((initial(), single.init(initial())), batches())
    np.testing.assert_array_equal(flj.masks(state)["w"], flj.masks(other)["w"])
    np.testing.assert_allclose(params["w"], expected["w"], rtol=2e-4, atol=1e-5)
print(jax.device_count(), "devices")
"""


@pytest.mark.slow
def test_inside_shard_map():
    """In a process of its own, which has two devices."""
    flags = f"{quick.FLAGS} --xla_force_host_platform_device_count=2"
    assert programs.told("-c", SHARDED, XLA_FLAGS=flags) == "2 devices\n"
