"""OBS scores."""

import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj


def test_scores_are_those_of_the_formula(x64):
    rng = np.random.default_rng(0)
    w, q = rng.normal(size=(4, 3)), rng.exponential(size=(4, 3))
    scores = flj.obs_saliency({"w": jnp.asarray(w)}, {"w": jnp.asarray(q)})["w"]
    np.testing.assert_allclose(scores, w**2 / (2 * q), rtol=1e-14)


def test_small_bfloat16_weights_are_squared_in_float32():
    """Two neighbours in bfloat16 have squares that bfloat16 could not tell apart from others'."""
    w = jnp.array([1.0, 1.0078125], jnp.bfloat16)
    scores = flj.obs_saliency(w, jnp.ones(2, jnp.float32))
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, np.array([1.0, 1.0078125], np.float32) ** 2 / 2)
