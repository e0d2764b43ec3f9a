"""Fits under Explicit axes, with a model that names none."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fishleg_jax as flj
from tests import dense

MODEL = flj.Model(dense.mlp, flj.likelihoods.categorical())
SPECS = {
    "Dense_0": {"kernel": P(None, "x"), "bias": P("x")},
    "Dense_1": {"kernel": P("x", None), "bias": P()},
}


@pytest.fixture(scope="module")
def placed():
    """Weights and a batch; a mesh of one device has the same rules as a larger one."""
    key, devices = jax.random.key(0), jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("x",), (AxisType.Explicit,), devices=devices)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = dense.mlp_params(key, (3, 4, 2))
    batch = dense.classification_batch(key, classes=2)
    return (params, batch), (
        jax.tree.map(place, params, SPECS),
        jax.tree.map(lambda x: place(x, P()), batch),
    )


def test_gradients_of_examples_take_a_model_that_names_no_axes(placed):
    """Its targets are checked without shardings, which its products could not take."""
    estimator = flj.inverse.diagonal(MODEL, 0.1)
    key = jax.random.key(1)
    plain, sharded = (flj.fit(estimator, params, [batch], key=key) for params, batch in placed)
    jax.tree.map(np.testing.assert_array_equal, plain, sharded)


def test_its_targets_are_checked(placed):
    params, (inputs, targets) = placed[1]
    with pytest.raises(ValueError, match=r"batches\[0\] does not fit the model: targets must"):
        flj.fit(flj.inverse.diagonal(MODEL), params, [(inputs, targets + 5)], key=jax.random.key(0))
