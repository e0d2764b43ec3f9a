"""Patterns of weights that are sharded over four devices, for `test_patterns_sharded.py`.

`python -m tests.pruning.patterns_sharded` prints for every case how the masks and weights differ
from those of one device, as JSON.
"""

import json
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fishleg_jax as flj
from tests import dense

MODEL = flj.Model(dense.mlp, flj.likelihoods.categorical())
PATTERNS = {
    "n_m": (flj.patterns.n_m(2, 4), None),
    "blocks": (flj.patterns.blocks((2, 2)), 0.5),
    "units": (flj.patterns.units([[("Dense_0/kernel", 1), ("Dense_1/kernel", 0)]]), 0.5),
}
ESTIMATORS = {
    "kfac": lambda: flj.inverse.kfac(MODEL, labels="empirical"),
    "mfac": lambda: flj.inverse.mfac(MODEL, 1e-3, window=32),
    "fishleg": lambda: flj.inverse.fishleg(MODEL, 0.1, kind="empirical", samples=4),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def pruned(params, batches, estimator, pattern, sparsity):
    result = flj.prune_one_shot(
        MODEL,
        params,
        ESTIMATORS[estimator](),
        batches,
        sparsity=sparsity,
        pattern=pattern,
        stages=1,
        saliency="obs",
        held_out=None,
        compensation=flj.compensation.independent(),
    )
    return jax.tree.map(np.asarray, (result.masks, result.params))


def main():
    """Prints the differences of all cases, or what was raised."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    params = dense.mlp_params(jax.random.key(0), (9, 16, 4), "float64")
    x = jax.random.normal(jax.random.key(1), (32, 9))
    batches = [(x, jnp.arange(32) % 4)]
    found = {"devices": jax.device_count()}
    for estimator in ESTIMATORS:
        for name, (pattern, sparsity) in PATTERNS.items():
            expected = pruned(params, batches, estimator, pattern, sparsity)
            for kind, axis in KINDS.items():
                mesh = jax.make_mesh((4,), ("x",), (axis,))
                specs = {
                    "Dense_0": {"kernel": P(None, "x"), "bias": P("x")},
                    "Dense_1": {"kernel": P("x", None), "bias": P()},
                }
                place = lambda w, spec, mesh=mesh: jax.device_put(w, NamedSharding(mesh, spec))
                try:
                    placed = jax.tree.map(place, params, specs)
                    data = jax.device_put(batches, NamedSharding(mesh, P()))
                    masks, weights = pruned(placed, data, estimator, pattern, sparsity)
                    wrong = jax.tree.map(lambda a, b: int((a != b).sum()), masks, expected[0])
                    far = jax.tree.map(lambda a, b: float(abs(a - b).max()), weights, expected[1])
                    numbers = sum(jax.tree.leaves(wrong)), max(jax.tree.leaves(far))
                    found[f"{estimator}, {name}, {kind}"] = numbers
                except Exception:  # one that fails must not hide the others
                    found[f"{estimator}, {name}, {kind}"] = traceback.format_exc(limit=-6)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
