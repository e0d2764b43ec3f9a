"""Patterns of weights that are sharded over four devices, for `test_patterns_sharded.py`.

`python -m tests.pruning.patterns_sharded` prints for every case how the masks and weights differ
from those of one device, and whether they lie where the weights did, as JSON.
"""

import json
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fishleg_jax as flj
from tests import dense

STEPS = 16


def explicit_mlp(params, x):
    """The same network for Explicit axes, where products name the sharding of their results."""
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = jnp.einsum("ni,io->no", x, first["kernel"], out_sharding=P(None, "x"))
    hidden = jnp.tanh(hidden + first["bias"])
    return jnp.einsum("ni,io->no", hidden, second["kernel"], out_sharding=P()) + second["bias"]


PLAIN = flj.Model(dense.mlp, flj.likelihoods.categorical())
MODELS = {
    "auto": PLAIN,
    "explicit": PLAIN._replace(predict=explicit_mlp),
}
PATTERNS = {
    "n_m": (flj.patterns.n_m(2, 4), None),
    "blocks": (flj.patterns.blocks((2, 2)), 0.5),
    "units": (flj.patterns.units([[("Dense_0/kernel", 1), ("Dense_1/kernel", 0)]]), 0.5),
}
# FishLeg alone takes the user's own model under Explicit axes
ESTIMATORS = {
    "kfac": lambda model: flj.inverse.kfac(PLAIN, labels="empirical"),
    "mfac": lambda model: flj.inverse.mfac(PLAIN, 1e-3, window=32),
    "fishleg": lambda model: flj.inverse.fishleg(model, 0.1, kind="empirical", samples=4),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {
    "Dense_0": {"kernel": P(None, "x"), "bias": P("x")},
    "Dense_1": {"kernel": P("x", None), "bias": P()},
}


def problem(mesh=None):
    """Weights and batches, over four devices with a kind of axis, else on one."""
    params = dense.mlp_params(jax.random.key(0), (9, 16, 4), "float64")
    x = jax.random.normal(jax.random.key(1), (32, 9))
    batches = [(x, jnp.arange(32) % 4)]
    if mesh is None:
        return params, batches
    place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))
    return jax.tree.map(place, params, SPECS), jax.device_put(batches, NamedSharding(mesh, P()))


def one_shot(name, kind, mesh=None):
    """Masks and weights by the name of the pattern, from one fit."""
    params, batches = problem(mesh)
    model = MODELS[kind] if mesh is not None else PLAIN
    estimator = ESTIMATORS[name](model)
    state = flj.fit(estimator, params, batches, key=jax.random.key(2))
    found = {}
    for pattern in ONE_SHOT[name]:
        groups, sparsity = PATTERNS[pattern]
        result = flj.prune_one_shot(
            model,
            params,
            estimator,
            batches,
            sparsity=sparsity,
            pattern=groups,
            stages=flj.Stages(1, state=state),
            saliency="obs",
            compensation=flj.compensation.none(),
        )
        found[pattern] = result.masks, result.params
    return found


def gradual(name, kind, mesh=None):
    """Masks and weights by the name of the pattern, after a few steps in a chain."""
    params, batches = problem(mesh)
    model = MODELS[kind] if mesh is not None else PLAIN
    found = {}
    for pattern in GRADUAL[name, kind]:
        groups, sparsity = PATTERNS[pattern]
        schedule = flj.schedules.cubic(sparsity or 0.5, begin=5, end=STEPS - 1)
        pruning = flj.gradual_prune(
            ESTIMATORS[name](model),
            schedule,
            model=model,
            pattern=groups,
            saliency="mixture",
            mask_every=5,
            aux_every=2,
        )
        tx = optax.chain(optax.sgd(0.05, momentum=0.9), pruning)

        @jax.jit
        def step(own, state, batch, tx=tx):
            grads = jax.grad(lambda p: flj.loss(model, p, batch))(own)
            updates, state = tx.update(grads, state, own, batch=batch)
            return optax.apply_updates(own, updates), state

        own, state = params, tx.init(params)
        for _ in range(STEPS):
            own, state = step(own, state, batches[0])
        assert flj.check(state).ok, flj.check(state).message
        found[pattern] = flj.masks(state), own
    return found


def compared(found, expected):
    """Number of masks that differ, the largest difference of weights, and whether all is placed."""
    mesh = jax.tree.leaves(found)[0].sharding.mesh
    like = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    placed = [
        x.sharding.is_equivalent_to(s, x.ndim)
        for tree in found
        for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    ]
    (masks, params), (other_masks, other) = (jax.tree.map(np.asarray, x) for x in (found, expected))
    wrong = jax.tree.map(lambda a, b: int((a != b).sum()), masks, other_masks)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, other)
    return sum(jax.tree.leaves(wrong)), max(jax.tree.leaves(apart)), all(placed)


WAYS = {"one_shot": one_shot, "gradual": gradual}
# FishLeg's blocks are those of K-FAC's factors
ONE_SHOT = {"kfac": tuple(PATTERNS), "mfac": tuple(PATTERNS), "fishleg": ("units",)}
# a step takes seconds to compile, and patterns see no more of an estimate than its scores
GRADUAL = {
    ("kfac", "auto"): ("n_m",),
    ("kfac", "explicit"): ("blocks",),
    ("fishleg", "auto"): ("units",),
    ("fishleg", "explicit"): ("units",),
}


def cases():
    """Estimator, way to prune, kind of axes, and the patterns of all runs."""
    return [
        (name, way, kind, ONE_SHOT[name] if way == "one_shot" else GRADUAL[name, kind])
        for name in ESTIMATORS
        for way in WAYS
        for kind in KINDS
        if way == "one_shot" or (name, kind) in GRADUAL
    ]


def main():
    """Prints the differences of all cases, or what was raised."""
    jax.config.update("jax_enable_x64", True)
    told, expected = {"devices": jax.device_count()}, {}
    for name, way, kind, patterns in cases():
        if not set(patterns) <= expected.setdefault((name, way), {}).keys():
            # a mesh of one device, or FishLeg has to assume that `jit` shards its arrays
            one = jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=jax.devices()[:1])
            with jax.set_mesh(one):
                expected[name, way] |= WAYS[way](name, kind)
        try:
            mesh = jax.make_mesh((4,), ("x",), (KINDS[kind],))
            with jax.set_mesh(mesh):
                found = WAYS[way](name, kind, mesh)
            own = {p: compared(found[p], expected[name, way][p]) for p in patterns}
        except Exception:  # one that fails must not hide the others
            own = dict.fromkeys(patterns, traceback.format_exc(limit=-6))
        told |= {f"{name}, {way}, {pattern}, {kind}": x for pattern, x in own.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
