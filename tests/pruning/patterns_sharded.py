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
    "kfac": flj.inverse.kfac(MODEL, labels="empirical"),
    "mfac": flj.inverse.mfac(MODEL, 1e-3, window=32),
    "fishleg": flj.inverse.fishleg(MODEL, 0.1, kind="empirical", samples=4),
}
KINDS = {"auto": AxisType.Auto}
SPECS = {
    "auto": {
        "Dense_0": {"kernel": P(None, "x"), "bias": P("x")},
        "Dense_1": {"kernel": P("x", None), "bias": P()},
    },
}


def problem(kind=None):
    """Weights and batches, over four devices with a kind of axis, else on one."""
    params = dense.mlp_params(jax.random.key(0), (9, 16, 4), "float64")
    x = jax.random.normal(jax.random.key(1), (32, 9))
    batches = [(x, jnp.arange(32) % 4)]
    if kind is None:
        return params, batches
    mesh = jax.make_mesh((4,), ("x",), (KINDS[kind],))
    place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))
    return jax.tree.map(place, params, SPECS[kind]), jax.device_put(
        batches, NamedSharding(mesh, P())
    )


def pruned(estimator, kind=None):
    """Masks and weights by the name of the pattern, from one fit."""
    params, batches = problem(kind)
    state = flj.fit(estimator, params, batches, key=jax.random.key(2))
    found = {}
    for name, (pattern, sparsity) in PATTERNS.items():
        result = flj.prune_one_shot(
            MODEL,
            params,
            estimator,
            batches,
            sparsity=sparsity,
            pattern=pattern,
            stages=flj.Stages(1, state=state),
            saliency="obs",
            compensation=flj.compensation.none(),
        )
        found[name] = jax.tree.map(np.asarray, (result.masks, result.params))
    return found


def main():
    """Prints the differences of all cases, or what was raised."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    told = {"devices": jax.device_count()}
    for name, estimator in ESTIMATORS.items():
        expected = pruned(estimator)
        for kind in KINDS:
            try:
                found = pruned(estimator, kind)
            except Exception:  # one that fails must not hide the others
                found = dict.fromkeys(PATTERNS, traceback.format_exc(limit=-6))
            for pattern, own in found.items():
                if not isinstance(own, str):
                    wrong = jax.tree.map(lambda a, b: int((a != b).sum()), own, expected[pattern])
                    own = sum(jax.tree.leaves(wrong[0])), sum(jax.tree.leaves(wrong[1]))
                told[f"{name}, {pattern}, {kind}"] = own
    print(json.dumps(told))


if __name__ == "__main__":
    main()
