"""Batch-norm statistics of pruned weights, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.models import networks, recalibration
from tests.experiments.small import small_spec


class Small(nn.Module):
    """Two dense layers with batch norm behind each."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(networks._norm(train, "one")(nn.Dense(4, name="first")(x)))
        return networks._norm(train, "two")(nn.Dense(3, name="second")(x))


SPEC = small_spec(Small(), (5,))


def expected(params, inputs):
    """The statistics of one batch, layer by layer."""
    hidden = inputs @ params["first"]["kernel"] + params["first"]["bias"]
    one = {"mean": hidden.mean(axis=0), "var": hidden.var(axis=0)}
    normal = (hidden - one["mean"]) / np.sqrt(one["var"] + 1e-5)
    normal = normal * params["one"]["scale"] + params["one"]["bias"]
    out = np.maximum(normal, 0) @ params["second"]["kernel"] + params["second"]["bias"]
    return {"one": one, "two": {"mean": out.mean(axis=0), "var": out.var(axis=0)}}


def assert_near(made, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), made, wanted)


def test_statistics_are_averages_over_batches():
    params, constants = SPEC.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    inputs = [rng.normal(1, 2, (size, 5)).astype(np.float32) for size in (30, 10)]
    made = recalibration.recalibrate(SPEC)(params, [(x, None, constants) for x in inputs])
    first, second = (expected(jax.tree.map(np.asarray, params), x) for x in inputs)
    assert_near(made, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first, second))


def test_former_statistics_do_not_matter():
    params, constants = SPEC.init(jax.random.key(1))
    inputs = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    other = jax.tree.map(lambda x: x + 7, constants)
    one, two = (
        recalibration.recalibrate(SPEC)(params, [(inputs, None, c)]) for c in (constants, other)
    )
    assert_near(one, two)


def test_a_pruned_network_predicts_better_with_statistics_of_its_own():
    params, _ = SPEC.init(jax.random.key(2))
    rng = np.random.default_rng(2)
    train = rng.normal(2, 1, (400, 5)).astype(np.float32), np.zeros(400, np.int32)
    dense = recalibration.recalibrated(SPEC, params, SPEC.init(jax.random.key(0))[1], train, seed=0)
    masks = flj.make_masks(jax.tree.map(jnp.abs, params), 0.5)
    pruned = flj.apply_masks(params, masks)
    own = recalibration.recalibrated(SPEC, pruned, dense, train, seed=0)
    targets = SPEC.model.predict(params, train[0], dense)

    def distance(constants):
        return float(jnp.mean((SPEC.model.predict(pruned, train[0], constants) - targets) ** 2))

    assert distance(own) < 0.8 * distance(dense)
