"""What depends on the inputs follows from the zeros, behind every kind of operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fishleg_jax as flj
from tests.compaction import networks

S = np.s_
UNITS = 16
X = jnp.abs(jax.random.normal(jax.random.key(0), (8, 6)))
OTHERS = 20 * X  # what is silent on X is not on these

TRIANGLE = jnp.eye(UNITS) - 0.1 * jnp.tri(UNITS, k=-1)

# operations in which unit 0, the only one that sees the inputs, reaches other units
MIXING = {
    "cumsum": lambda h: lax.cumsum(h, 1),
    "cummax": lambda h: lax.cummax(h, 1),
    "cumlogsumexp": lambda h: lax.cumlogsumexp(h, 1),
    "sort": lambda h: lax.sort(h, dimension=1),
    "sort of two": lambda h: lax.sort((h, h + 1), dimension=1)[1],
    "top_k": lambda h: lax.top_k(h, UNITS)[0][:, ::-1],
    "while": lambda h: lax.while_loop(lambda c: c[0, 1] < 0.11, lambda c: jnp.cumsum(c, 1), h),
    "cond": lambda h: lax.cond(h[0, 0] > -1, lambda c: c[:, ::-1], lambda c: c, h),
    "rev": lambda h: h[:, ::-1],
    "roll": lambda h: jnp.roll(h, 3, axis=1),
    "gather": lambda h: h[:, jnp.arange(UNITS)[::-1]],
    "fft": lambda h: jnp.abs(jnp.fft.fft(h)),
    "triangular_solve": lambda h: jax.scipy.linalg.solve_triangular(TRIANGLE, h.T, lower=True).T,
    "associative_scan": lambda h: lax.associative_scan(jnp.add, h, axis=1),
    "dynamic_update_slice": lambda h: lax.dynamic_update_slice(h, h[:, :1], (0, 3)),
    "scatter": lambda h: h.at[:, 3].set(h[:, 0]),
    "shift": lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0))),
    "window": lambda h: lax.reduce_window(h, 0.0, lax.max, (1, 3), (1, 1), "SAME"),
    "thinned": lambda h: lax.reduce_window(h, 0.0, lax.max, (1, 1), (1, 2), "SAME").repeat(2, 1),
    "sum": lambda h: h + h.sum(1, keepdims=True),
    "product": lambda h: h @ jnp.abs(TRIANGLE.T),
    "callback": lambda h: jax.pure_callback(lambda x: np.asarray(x)[:, ::-1], h, h),
}
ELEMENTWISE = {
    "tanh": jnp.tanh,
    "where": lambda h: jnp.where(h > 0.5, h, 0.2 * h),
    "clip": lambda h: jnp.clip(h, 0.0, 3.0),
    "gelu": jax.nn.gelu,
    "round": lambda h: h + lax.stop_gradient(jnp.round(h) - h),
    "cummax over examples": lambda h: lax.cummax(h, 0),
    "barrier": lambda h: lax.optimization_barrier((h, h + 1))[0],
    "window over examples": lambda h: lax.reduce_window(h, 0.0, lax.max, (2, 1), (1, 1), "SAME"),
}


def network(mix):
    def f(params, x):
        h = mix(jax.nn.relu(x @ params["w1"] + params["b1"]))
        return jax.nn.relu(h @ params["w2"] + params["b2"]) @ params["w3"] + params["b3"]

    return f


def setting(mix):
    """Six units of the second layer see unit 0 only through `mix`, and are silent on `X`."""
    params = networks.mlp_params((6, UNITS, 12, 4))
    params = {name: jnp.abs(x) for name, x in params.items()}
    params["b1"] = jnp.full(UNITS, 0.1)
    masks = networks.masks_without(params, w1=S[:, 1:], w2=S[0, :6])
    pruned = flj.apply_masks(params, masks)
    sums = mix(jax.nn.relu(X @ pruned["w1"] + pruned["b1"])) @ pruned["w2"]
    params["b2"] = params["b2"].at[:6].set(-1.01 * sums.max(axis=0)[:6])
    return params, masks


@pytest.mark.parametrize("name", MIXING)
def test_units_that_see_the_inputs_through_other_units_stay(name):
    f = network(MIXING[name])
    params, masks = setting(MIXING[name])
    expected = f(flj.apply_masks(params, masks), OTHERS)
    # Without the six units the outputs are the same on X, and others elsewhere.
    silent = {**params, "w3": params["w3"].at[:6].set(0)}
    np.testing.assert_array_equal(
        f(flj.apply_masks(silent, masks), X), f(flj.apply_masks(params, masks), X)
    )
    wrong = f(flj.apply_masks(silent, masks), OTHERS)
    assert np.abs(wrong - expected).max() > 1e-3 * np.abs(expected).max()
    small = flj.compact(f, params, masks, X)
    np.testing.assert_allclose(f(small.params, OTHERS), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_units_behind_elementwise_operations_go(name):
    f = network(ELEMENTWISE[name])
    params, masks = setting(ELEMENTWISE[name])
    small = flj.compact(f, params, masks, X)
    assert [(x.before, x.after) for x in small.report.units] == [(UNITS, 1), (12, 6)]
    expected = f(flj.apply_masks(params, masks), OTHERS)
    np.testing.assert_allclose(f(small.params, OTHERS), expected, rtol=1e-5)


def test_units_of_a_given_coupling_stay_where_their_order_matters():
    """A median does not change when units are permuted, but when one of them leaves."""

    def f(params, x):
        h = jax.nn.relu(x @ params["w1"] + params["b1"])
        return h @ params["w2"] + jnp.sort(h, axis=1)[:, 8:9]

    params = {k: v for k, v in networks.mlp_params((6, UNITS, 4)).items() if k != "b2"}
    masks = networks.masks_without(params, w2=S[:5])
    given = [[("w1", 1), ("b1", 0), ("w2", 0)]]
    small = flj.compact(f, params, masks, X, couplings=given)
    (units,) = small.report.units
    assert units.after == UNITS
    ((reason, which),) = units.stay.items()
    assert which == (0, 1, 2, 3, 4) and "in its order by 'sort'" in reason
