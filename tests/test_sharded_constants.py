"""A user's `jit` that closes over arrays on several devices."""

import json

import pytest

from tests import programs

pytestmark = pytest.mark.slow

RUN = """
import json, jax, jax.numpy as jnp, numpy as np
import fishleg_jax as flj
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
def predict(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    if "conv" in params:
        x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=numbers)
    return x.reshape(len(x), -1) @ params["dense"]
model = flj.Model(predict, flj.likelihoods.categorical())
draw = lambda i, *shape: np.asarray(jax.random.normal(jax.random.key(i), shape))
batch = draw(0, 8, 2, 2, 2), np.arange(8) % 4
on_all = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
chunked = flj.inverse.diagonal(model, labels="empirical", examples_per_chunk=4)
def squares(params, batch):
    state = chunked.update(chunked.init(params), params, batch, jax.random.key(0))
    return state.squares
functions = [lambda p, b: flj.per_example_gradients(model, p, b), squares]
found = {}
for network in "dense", "conv":
    params = {"dense": draw(1, 8, 4)}
    if network == "conv":
        params["conv"] = draw(2, 3, 3, 2, 2)
    spread = {**on_all(params), "dense": on_all(params["dense"], None, "d")}, on_all(batch, "d")
    for number, function in enumerate(functions):
        calls = [jax.jit(lambda b: function(spread[0], b)), jax.jit(lambda p: function(p, spread[1])),
                 jax.jit(lambda: function(*spread))]
        expected = jax.jit(function)(params, batch)
        for call, given in zip(calls, [(batch,), (params,), ()], strict=True):
            try:
                pairs = zip(jax.tree.leaves(call(*given)), jax.tree.leaves(expected), strict=True)
                apart = max(float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
            except Exception as error:
                apart = repr(error)[:200]
            found.setdefault(network, []).append(apart)
print(json.dumps(found))
"""  # noqa: E501


@pytest.fixture(scope="module")
def apart():
    return json.loads(programs.told("-c", RUN, NPROC="32").splitlines()[-1])


@pytest.mark.parametrize("network", ["dense", "conv"])
def test_weights_or_batch_may_be_constants_of_a_jit(apart, network):
    """Gradients and an estimate's update, of sharded weights, a sharded batch or both."""
    assert len(apart[network]) == 6
    assert [x for x in apart[network] if not isinstance(x, float) or x > 1e-12] == []
