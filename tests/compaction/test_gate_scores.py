"""Scores of gates against dense algebra, on networks in which several leaves read a unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj


def network(params, inputs, scale=1.0):
    """A convolution, a residual sum, a mean, and two layers that read the same units."""
    window = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        inputs, params["conv"], (1, 1), "SAME", dimension_numbers=window
    )
    x = jnp.tanh(x * params["norm"] * scale)
    x = x + jnp.tanh(x @ params["inner"]["in"]) @ params["inner"]["out"]
    x = x.mean(axis=(1, 2))
    return x @ params["one"] + jnp.tanh(x) @ params["two"]


@pytest.fixture
def setting(x64):
    del x64
    keys = jax.random.split(jax.random.key(0), 8)
    shapes = {"conv": (3, 3, 2, 4), "norm": (4,), "one": (4, 3), "two": (4, 3)}
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=False)}
    params["inner"] = {
        "in": jax.random.normal(keys[4], (4, 5)),
        "out": jax.random.normal(keys[5], (5, 4)),
    }
    batch = jax.random.normal(keys[6], (6, 4, 4, 2)), jax.random.normal(keys[7], (6, 3))
    return flj.Model(network, flj.likelihoods.gaussian()), params, batch


# the first axis of everything that reads the units of each coupling, and how it is laid out
READERS = {
    "conv": [("inner/in", 0), ("one", 0), ("two", 0)],
    "inner/in": [("inner/out", 0)],
}


def test_scores_are_those_of_the_dense_fisher(setting):
    model, params, batch = setting
    scores = flj.gate_scores(model, params, [batch], labels="empirical")
    gradients = flj.per_example_gradients(model, params, batch)
    leaves = {"inner/in": ("inner", "in"), "inner/out": ("inner", "out")}

    def of(tree, name):
        for part in leaves.get(name, (name,)):
            tree = tree[part]
        return np.asarray(tree)

    checked = 0
    for coupling, values in zip(scores.couplings, scores.values, strict=True):
        names = {name for name, *_ in coupling}
        readers = READERS["conv" if "conv" in names else "inner/in"]
        for unit, value in enumerate(values):
            w = np.concatenate([of(params, name)[unit].ravel() for name, _ in readers])
            g = np.concatenate(
                [of(gradients, name)[:, unit].reshape(6, -1) for name, _ in readers], 1
            )
            fisher = g.T @ g / 6
            np.testing.assert_allclose(value, w @ fisher @ w / 2, rtol=1e-5)
            checked += 1
    assert checked == 9


def test_a_gate_predicts_the_curvature_of_closing_it(setting):
    model, params, (inputs, _) = setting
    # at its own outputs as targets the gradient is zero, and sampled labels give the Fisher
    scores = flj.gate_scores(model, params, [(inputs, None)] * 400, key=jax.random.key(1))
    at = next(i for i, c in enumerate(scores.couplings) if ("inner/out", 0) in map(tuple, c))

    def outputs(gates):
        inner = {**params["inner"], "out": params["inner"]["out"] * gates[:, None]}
        return network({**params, "inner": inner}, inputs)

    jacobian = jax.jacobian(outputs)(jnp.ones(5))
    exact = jnp.square(jacobian).sum(axis=(0, 1)) / (2 * len(inputs))
    np.testing.assert_allclose(scores.values[at], exact, rtol=0.15)


def test_chunks_and_batches_change_nothing(setting):
    model, params, batch = setting
    whole = flj.gate_scores(model, params, [batch], labels="empirical")
    halves = [tuple(x[:4] for x in batch), tuple(x[4:] for x in batch)]
    parts = flj.gate_scores(model, params, halves, labels="empirical", examples_per_chunk=3)
    for one, other in zip(whole.values, parts.values, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_constants_and_choice(setting):
    model, params, batch = setting
    with_constants = (*batch, jnp.ones(()))
    scores = flj.gate_scores(model, params, [with_constants], labels="empirical")
    plain = flj.gate_scores(model, params, [batch], labels="empirical")
    np.testing.assert_allclose(scores.values[0], plain.values[0], rtol=1e-6)
    goal = flj.targets.weights(60)
    masks = flj.choose_units(network, params, plain, goal, batch[0])
    small = flj.compact(network, params, masks, batch[0])
    assert small.report.weights[1] <= 60


def test_bad_arguments_are_refused(setting):
    model, params, batch = setting
    with pytest.raises(ValueError, match="batches must hold"):
        flj.gate_scores(model, params, [])
    model = flj.Model(
        lambda p, x: (jnp.tanh(x @ p["in"]) * p["by"]).sum(axis=1), flj.likelihoods.gaussian()
    )
    params = {"in": jnp.ones((3, 2)), "by": jnp.ones(2)}
    batch = jnp.ones((4, 3)), jnp.ones(4)
    with pytest.raises(ValueError, match="no weight reads the units"):
        flj.gate_scores(model, params, [batch], couplings=[[("in", 1), ("by", 0)]])
