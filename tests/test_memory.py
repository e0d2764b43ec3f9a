"""The memory of a fit, predicted from shapes."""

import jax
import jax.numpy as jnp
import pytest

import fishleg_jax as flj

WEIGHTS = {
    "a": jax.ShapeDtypeStruct((50, 40), "float32"),
    "b": jax.ShapeDtypeStruct((40,), "float32"),
}
EXAMPLES = 4096
BATCH = (jax.ShapeDtypeStruct((EXAMPLES, 50), "float32"), None)


def predict(params, x):
    return jnp.tanh(x @ params["a"]) + params["b"]


MODEL = flj.Model(predict, flj.likelihoods.gaussian())


def test_a_state_is_what_it_is_predicted_to_be():
    estimator = flj.inverse.diagonal(MODEL, examples_per_chunk=64)
    found = flj.peak_memory(estimator, WEIGHTS, BATCH)
    exact = 4 * (50 * 40 + 40) + 12
    assert exact <= found.state < exact + 100  # and a table of where its arrays are
    assert found.peak == found.state + found.update


def test_a_chunk_lowers_the_peak():
    def update(chunk):
        estimator = flj.inverse.diagonal(MODEL, examples_per_chunk=chunk)
        return flj.peak_memory(estimator, WEIGHTS, BATCH).update

    rows = 4 * 50 * 40  # a gradient
    assert update(None) > EXAMPLES * rows
    assert update(64) < EXAMPLES * rows / 8  # what is left is mostly data in chunks


def test_a_fit_finds_the_update_compiled():
    traced = []

    def counted(params, x):
        traced.append(x.shape[0])
        return predict(params, x)

    model = flj.Model(counted, flj.likelihoods.gaussian())
    estimator = flj.inverse.diagonal(model)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), WEIGHTS)
    batch = (jnp.ones((4, 50)), None)
    assert flj.peak_memory(estimator, params, batch).update > 0
    gradients = traced.count(1)  # of single examples
    flj.fit(estimator, params, [batch], key=jax.random.key(0))
    assert traced.count(1) == gradients > 0


def test_nothing_is_nothing():
    assert flj.peak_memory(flj.inverse.identity(), WEIGHTS, BATCH).peak == 0


def test_what_does_not_fit_is_refused():
    huge = jax.ShapeDtypeStruct((10**6, 10**6), "float32")
    with pytest.raises(ValueError, match="window=1000"):
        flj.peak_memory(flj.inverse.mfac(MODEL), {"a": huge, "b": WEIGHTS["b"]}, BATCH)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"estimator": "fishleg"}, "estimator must be an InverseFisher"),
        ({"estimator": flj.inverse.fishleg(MODEL, axis_name="i")}, "axis_name='i', which is for"),
        ({"params": jnp.ones(3, int)}, "must be a floating-point array"),
        ({"batch": jnp.ones((2, 3))}, "batch must be a tuple"),
        ({"batch": ()}, "batch must be a tuple"),
        ({"masks": 1}, "masks"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {
        "estimator": flj.inverse.diagonal(MODEL),
        "params": jnp.ones(3),
        "batch": (jnp.ones((2, 3)), None),
    }
    with pytest.raises(ValueError, match=message):
        flj.peak_memory(**given | arguments)
