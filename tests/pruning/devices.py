"""Training steps on several devices with a part of the batch each, for `test_gradual_devices.py`.

`python -m tests.pruning.devices` compares every case with one device that has whole batches, and
prints how far off it is, as JSON.  It has to be a process of its own: how many devices there are
is settled when jax starts.
"""

import functools
import json
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fishleg_jax as flj

DEVICES, EXAMPLES, STEPS = 4, 16, 13
AXIS = "devices"
SPARSITY = 0.7


class Case(NamedTuple):
    """A pruning that several devices and a single one make.

    Attributes:
        make: makes its estimator, of the name of the axis or None.
        options: of `gradual_prune`.
    """

    make: Callable[[Any], flj.InverseFisher]
    options: dict[str, Any]


def predict(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def sample(key, outputs):
    """Labels that look random, but belong to the example: so devices draw those of the batch."""
    del key
    return outputs + jnp.where(jnp.sin(1e3 * outputs) > 0, 1.0, -1.0)


MODEL = flj.Model(predict, flj.likelihoods.gaussian()._replace(sample=sample, root=None))
GROUP = {"compensation": flj.compensation.group()}
INDEPENDENT = {"compensation": flj.compensation.independent(check_step=True, first_order=True)}
REGROW = {"regrow": 0.3}
BLOCKS = {"pattern": flj.patterns.blocks((1, 2))}


def fishleg(axis_name):
    return flj.inverse.fishleg(MODEL, start=4, axis_name=axis_name)


def of_gathered(name, **options):
    """An estimator that knows no axis: it is handed the batch of all devices."""
    return lambda axis_name: getattr(flj.inverse, name)(MODEL, 0.05, **options)


CASES = {
    "fishleg": Case(fishleg, INDEPENDENT | REGROW),
    "fishleg, group": Case(fishleg, GROUP),
    "kfac": Case(of_gathered("kfac", labels="empirical"), GROUP | REGROW),
    "woodfisher": Case(
        of_gathered("woodfisher", gradients=2 * EXAMPLES), INDEPENDENT | {"renew": 2}
    ),
    "fishleg, blocks": Case(fishleg, INDEPENDENT | BLOCKS),
    "diagonal, blocks": Case(of_gathered("diagonal", labels="empirical"), INDEPENDENT | BLOCKS),
    "identity": Case(lambda axis_name: flj.inverse.identity(), INDEPENDENT | REGROW),
}
IN_PMAP = OVER_TWO_AXES = ("fishleg", "diagonal, blocks")


def initial():
    keys = jax.random.split(jax.random.key(0))
    return {"kernel": jax.random.normal(keys[0], (5, 4)), "bias": jax.random.normal(keys[1], (4,))}


def batches():
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (STEPS, EXAMPLES, 5)) * jnp.array([0.3, 0.5, 0.8, 1, 2])
    y = jnp.tanh(x @ jax.random.normal(keys[1], (5, 4)))
    return x, y + jax.random.normal(keys[2], y.shape)


def run(case: Case, axis_name: Any, average: Callable, data: Any) -> dict[str, Any]:
    """The steps of a device on its batches: what is left of the weights, and the state."""
    schedule = flj.schedules.cubic(SPARSITY, begin=5, end=11)
    pruning = flj.gradual_prune(
        case.make(axis_name),
        schedule,
        model=MODEL,
        mask_every=2,
        aux_every=2,
        axis_name=axis_name,
        **case.options,
    )
    tx = optax.chain(optax.sgd(0.02), pruning)

    def step(carry, batch):
        params, state = carry
        grads = average(jax.grad(lambda p: flj.loss(MODEL, p, batch))(params))
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), flj.masks(state)

    params = initial()
    (params, state), masks = jax.lax.scan(step, (params, tx.init(params)), data)
    return {"params": params, "masks": masks, "state": state[-1]}


def on_one(case: Case) -> dict[str, Any]:
    # a mesh of one device, or FishLeg has to assume that `jit` shards its arrays over all of them
    mesh = jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.jit(lambda data: run(case, None, lambda grads: grads, data))(batches())


def in_shard_map(case: Case, name: str | tuple[str, str] = AXIS) -> dict[str, Any]:
    """The steps over an axis of all devices, or two; that all agree is what it checks."""
    mesh = jax.make_mesh(
        (DEVICES,) if name == AXIS else (2, DEVICES // 2), (name,) if name == AXIS else name
    )

    def average(grads):  # by weights that all devices share it is summed already
        return jax.tree.map(lambda g: g / DEVICES, grads)

    local = functools.partial(run, case, name, average)
    spread = jax.shard_map(local, mesh=mesh, in_specs=P(None, name), out_specs=P())
    placed = jax.device_put(batches(), jax.NamedSharding(mesh, P(None, name)))
    return jax.jit(spread)(placed)


def in_pmap(case: Case) -> dict[str, Any]:
    parts = jax.tree.map(
        lambda x: x.reshape(STEPS, DEVICES, -1, x.shape[-1]).swapaxes(0, 1), batches()
    )
    average = functools.partial(jax.lax.pmean, axis_name=AXIS)
    found = jax.pmap(functools.partial(run, case, AXIS, average), axis_name=AXIS)(parts)
    for leaf in jax.tree.leaves(found):  # nobody else checks that all devices agree
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], found)


def difference(found: Any, expected: Any) -> float:
    """The largest difference between two trees, relative to the largest number of a leaf."""

    def of_leaf(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if np.array_equal(x, y, equal_nan=True):
            return 0.0
        return float(np.abs(x - y).max() / np.abs(y).max())

    return max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected)))


def compared(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How two runs differ, and that the first pruned at all."""
    told = flj.check(found["state"])
    return {
        **{name: difference(found[name], expected[name]) for name in found},
        "different_masks": len({mask.tobytes() for mask in np.asarray(found["masks"]["kernel"])}),
        "sparsity": flj.sparsity(found["params"]),
        "ok": told.ok,
    }


def main() -> None:
    """Prints the differences of all cases, or what was raised."""
    jax.config.update("jax_enable_x64", True)
    results = {"devices": jax.device_count()}
    for name, case in CASES.items():
        ways = {"shard_map": in_shard_map}
        if name in IN_PMAP:
            ways["pmap"] = in_pmap
        if name in OVER_TWO_AXES:
            ways["shard_map over two axes"] = functools.partial(in_shard_map, name=("a", "b"))
        expected = on_one(case)
        for way, run_on_all in ways.items():
            try:
                results[f"{name} in {way}"] = compared(run_on_all(case), expected)
            except Exception:  # one that fails must not hide the others
                results[f"{name} in {way}"] = traceback.format_exc(limit=-8)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
