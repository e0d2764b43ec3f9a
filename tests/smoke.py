"""A smoke test of the library with jax and optax alone: `python tests/smoke.py`."""

import sys

import jax
import jax.numpy as jnp

import fishleg_jax as flj


def predict(params, x):
    """A network of two layers."""
    return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["out"]["kernel"]


def main() -> None:
    """Prunes random weights with FishLeg, and says with what."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (8, 16)) / 3},
        "out": {"kernel": jax.random.normal(keys[1], (16, 4)) / 4},
    }
    model = flj.Model(predict, flj.likelihoods.categorical())
    batch = (jax.random.normal(keys[2], (64, 8)), None)
    estimator = flj.inverse.fishleg(model, start=16, updates=40)
    result = flj.prune_one_shot(model, params, estimator, [batch], sparsity=0.5)
    assert flj.sparsity(result.params) == 0.5
    assert jnp.isfinite(result.state.damping) and result.state.damping > 0
    assert "flax" not in sys.modules
    print(f"fishleg_jax {flj.__version__} works with jax {jax.__version__}")


if __name__ == "__main__":
    main()
