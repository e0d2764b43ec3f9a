"""The smaller network is the same function for inputs of other sizes as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

KEYS = jax.random.split(jax.random.key(0), 8)
UNITS = 6


def pooled(reduce):
    """A layer on every position, pooled."""

    def f(p, x):
        return reduce(jax.nn.relu(x @ p["w1"] + p["b1"])) @ p["w2"] + p["b2"]

    params = {
        "w1": jax.random.normal(KEYS[0], (3, UNITS)).at[:, :2].set(0),
        "b1": jnp.full(UNITS, 0.5),
        "w2": jax.random.normal(KEYS[1], (UNITS, 2)),
        "b2": jnp.zeros(2),
    }
    return f, params


def recurrent(p, x):
    """The last state of a loop over time."""

    def step(h, x):
        h = jnp.tanh(h @ p["h"] + x @ p["w1"] + p["b1"])
        return h, None

    start = jnp.zeros((len(x), p["b1"].size))
    last, _ = jax.lax.scan(step, start, x.swapaxes(0, 1))
    return last @ p["w2"] + p["b2"]


def recurrent_params(h, w1):
    return {
        "h": h,
        "w1": w1,
        "b1": jnp.full(UNITS, 0.3),
        "w2": jax.random.normal(KEYS[1], (UNITS, 2)),
        "b2": jnp.zeros(2),
    }


def difference(f, params, small, length, width=3):
    x = jax.random.normal(KEYS[2], (4, length, width))
    return float(abs(f(params, x) - f(small.params, x)).max() / abs(f(params, x)).max())


def test_a_constant_that_grows_with_the_length_stays():
    f, params = pooled(lambda h: h.sum(1))
    small = flj.compact(f, params, None, jax.random.normal(KEYS[3], (4, 5, 3)))
    assert difference(f, params, small, 20) < 1e-5
    (units,) = small.report.units
    assert units.after == UNITS and "changes with the size of the inputs" in str(small.report)


def test_a_mean_over_positions_is_folded():
    f, params = pooled(lambda h: h.mean(1))
    small = flj.compact(f, params, None, jax.random.normal(KEYS[3], (4, 5, 3)))
    assert difference(f, params, small, 20) < 1e-5
    assert small.report.units[0].after == UNITS - 2 and small.report.folded == ("b2",)


def test_units_that_change_with_time_by_themselves_stay():
    """Without inputs, but each remembers itself."""
    h = jax.random.normal(KEYS[4], (UNITS, UNITS)) / 4
    h = h.at[:, :3].set(0).at[jnp.arange(3), jnp.arange(3)].set(0.95)
    params = recurrent_params(h, jax.random.normal(KEYS[0], (3, UNITS)).at[:, :3].set(0))
    small = flj.compact(recurrent, params, None, jnp.ones((4, 3, 3)))
    assert difference(recurrent, params, small, 30) < 1e-5


@pytest.mark.parametrize("bias, after", [(0.0, UNITS - 3), (0.3, UNITS)])
def test_units_without_memory_go_if_they_give_out_nothing(bias, after):
    """A loop begins at zeros, so that another constant would be missing from the first step."""
    h = (jax.random.normal(KEYS[4], (UNITS, UNITS)) / 4).at[:, :3].set(0)
    params = recurrent_params(h, jax.random.normal(KEYS[0], (3, UNITS)).at[:, :3].set(0))
    params["b1"] = params["b1"].at[:3].set(bias)
    small = flj.compact(recurrent, params, None, jnp.ones((4, 4, 3)))
    assert difference(recurrent, params, small, 30) < 1e-5
    assert small.report.units[0].after == after


def test_a_sequence_has_to_reach_all_units():
    """A chain: only the first unit reads the inputs, each other the one before it."""
    h = jnp.eye(UNITS, k=1)
    params = recurrent_params(h, jnp.zeros((3, UNITS)).at[:, 0].set(1))
    with pytest.raises(ValueError, match="inputs must be longer"):
        flj.compact(recurrent, params, None, jnp.ones((4, 3, 3)))
    small = flj.compact(recurrent, params, None, jnp.ones((4, UNITS, 3)))
    assert difference(recurrent, params, small, 30) < 1e-5
    assert small.report.units[0].after == UNITS


def test_a_loop_that_python_unrolls_counts_as_one():
    def f(p, x):
        h = jnp.zeros((len(x), p["b1"].size))
        for i in range(x.shape[1]):
            h = jnp.tanh(h @ p["h"] + x[:, i] @ p["w1"] + p["b1"])
        return h @ p["w2"] + p["b2"]

    params = recurrent_params(jnp.eye(UNITS, k=1), jnp.zeros((3, UNITS)).at[:, 0].set(1))
    with pytest.raises(ValueError, match="inputs must be longer"):
        flj.compact(f, params, None, jnp.ones((4, 2, 3)))


def test_images_of_half_the_size():
    """Channels with a constant behind a sum over pixels stay, behind a mean they go."""
    layout = ("NHWC", "HWIO", "NHWC")

    def f(p, x, pool):
        h = jax.lax.conv_general_dilated(x, p["w1"], (1, 1), "SAME", dimension_numbers=layout)
        return pool(jax.nn.relu(h + p["b1"]), axis=(1, 2)) @ p["w2"] + p["b2"]

    params = {
        "w1": jax.random.normal(KEYS[0], (3, 3, 2, UNITS)).at[..., :2].set(0),
        "b1": jnp.full(UNITS, 0.5),
        "w2": jax.random.normal(KEYS[1], (UNITS, 2)),
        "b2": jnp.zeros(2),
    }
    for pool, after in ((jnp.mean, UNITS - 2), (jnp.sum, UNITS)):
        call = lambda p, x, pool=pool: f(p, x, pool)
        small = flj.compact(call, params, None, jax.random.normal(KEYS[3], (4, 6, 6, 2)))
        assert small.report.units[0].after == after
        x = jax.random.normal(KEYS[5], (2, 13, 9, 2))
        np.testing.assert_allclose(call(small.params, x), call(params, x), rtol=1e-4, atol=1e-5)


def test_a_size_at_which_a_reshape_cuts_units_apart_decides_nothing():
    """Four positions are added up in four parts; at two positions parts cut the units."""

    def f(p, x):
        hidden = jnp.tanh(x @ p["w1"])
        parts = hidden.reshape(len(x), 4, -1).sum(1)
        if parts.shape[1] % hidden.shape[2]:
            return parts.sum(-1, keepdims=True)
        return parts.reshape(len(x), -1, hidden.shape[2]) @ p["w2"]

    params = {
        "w1": jax.random.normal(KEYS[0], (3, UNITS)),
        "w2": jax.random.normal(KEYS[1], (UNITS, 2)).at[:2].set(0),
    }
    small = flj.compact(f, params, None, jax.random.normal(KEYS[3], (4, 4, 3)))
    assert small.params["w1"].shape == (3, UNITS - 2)


def test_a_convolution_that_pads_odd_sizes_only():
    """Kernels of 2 by 2 with stride 2 pad nothing of an even size; also behind another of them."""
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=layout)
    keys = jax.random.split(KEYS[6], 4)
    params = {
        "a": jax.random.normal(keys[0], (2, 2, 3, 6)).at[..., :2].set(0),
        "ab": jnp.full(6, 0.3),
        "b": jax.random.normal(keys[1], (2, 2, 6, 5)),
        "bb": jax.random.normal(keys[2], (5,)),
        "o": jax.random.normal(keys[3], (5, 2)),
    }

    def f(p, x):
        h = jax.nn.relu(conv(x, p["a"]) + p["ab"])
        return jax.nn.relu(conv(h, p["b"]) + p["bb"]).mean((1, 2)) @ p["o"]

    small = flj.compact(f, params, None, jax.random.normal(KEYS[3], (4, 8, 8, 3)))
    for shape in ((2, 7, 7, 3), (2, 9, 6, 3)):
        x = jax.random.normal(KEYS[5], shape)
        np.testing.assert_allclose(f(small.params, x), f(params, x), rtol=1e-4, atol=1e-5)
