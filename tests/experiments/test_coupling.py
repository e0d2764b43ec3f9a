"""The correction of `experiments.coupling` against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.coupling import Coupled


def test_all_directions_of_the_samples_give_the_exact_inverse(x64, key):
    """From `Q_b = I/γ`, where whitening changes nothing, and the same samples on both sides."""
    damping, samples = 0.3, jax.random.normal(key, (5, 8), jnp.float64)
    coupled = Coupled(lambda v: v / damping, damping, samples, samples)
    y, share = coupled.leading(5)
    found = jnp.eye(8) / damping - y.T @ (share[:, None] * y)
    fisher = samples.T @ samples / 5
    np.testing.assert_allclose(found, np.linalg.inv(fisher + damping * np.eye(8)), rtol=1e-9)


def test_directions_in_which_the_estimate_is_too_small_are_left_alone(x64, key):
    """Those along which the whitened Fisher is below one: nothing can be deflated there."""
    samples = jax.random.normal(key, (5, 8), jnp.float64)
    fisher = samples.T @ samples / 5
    large = np.linalg.inv(fisher + 0.3 * np.eye(8)) / 2
    coupled = Coupled(lambda v: large @ v, 0.3, samples, samples)
    assert not np.asarray(coupled.leading(5)[1]).any()
