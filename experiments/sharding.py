"""Prunes a small network spread over eight devices of the CPU, and compares with one device.

    python -m experiments.sharding
    python -m experiments.sharding --estimator fishleg,kfac --mesh explicit --dtype float32

Meshes have Auto or Explicit axes.  Layouts: `data`, batches spread over all devices; `full`,
batches and weights over all of them; `mixed`, batches over four and weights over two.  A row tells
how many masks differ, the largest relative difference of weights that both keep, whether all lay
where the weights do, and of the compiled texts the largest all-gather that the model's own gradient
does not have, of numbers or of a mask; that is to be less than the smaller kernel, and is named
where it is not.  With the convolution per-example gradients may gather every weight once, which
without one (`--network dense`) they do not.  With `data`, where every device has all weights and
all of a state, gathers are named but not counted: WoodFisher and M-FAC need the gradients of all
examples everywhere.  The exit code is 1 where a row is not as it has to be.
"""

import argparse
import functools
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fishleg_jax as flj
from experiments import arguments
from fishleg_jax import _mesh, _placement, fisher
from fishleg_jax.pruning.masks import _keep

P = PartitionSpec
DEVICES, MESH = 8, (4, 2)
SIZES, EXAMPLES, SPARSITY = (32, 64, 48), 96, 0.6
GRADIENTS = EXAMPLES // 4  # of mfac
SMALLEST_KERNEL = 32 * 64
EVERYWHERE = ("data", "model")
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
IMAGE, CHANNELS = (4, 4, 2), 8  # a convolution makes 2x2 positions of 8 channels of it: 32 numbers
# of the batch's examples, of the two kernels, of the bias and of the convolution
LAYOUTS = {
    "data": (P(EVERYWHERE), P(), P(), P(), P()),
    "full": (P(EVERYWHERE), *[P(EVERYWHERE)] * 3, P(None, None, None, EVERYWHERE)),
    "mixed": (
        P("data"), P(None, "model"), P("model", None), P("model"), P(None, None, None, "model"),
    ),
}  # fmt: skip
ESTIMATORS = {
    "identity": lambda model: flj.inverse.identity(),
    "diagonal": lambda model: flj.inverse.diagonal(model, 0.1),
    "kfac": lambda model: flj.inverse.kfac(model, 0.1, cap=16),
    "woodfisher": lambda model: flj.inverse.woodfisher(model, 0.1, gradients=96, block_size=16),
    "mfac": lambda model: flj.inverse.mfac(
        model, 0.1, window=24, block_size="leaf", examples_per_gradient=4
    ),
    "mfac_all": lambda model: flj.inverse.mfac(model, 0.1, window=24, examples_per_gradient=4),
    "fishleg": lambda model: flj.inverse.fishleg(model, 0.1, start=4, updates=6, cap=16),
}
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}  # of weights; masks are to be the same


class Case(NamedTuple):
    """A network, and where it lies.

    Attributes:
        model: as its user writes it for the mesh.
        plain: the same without a word of devices, of which per-example gradients are made.
        params: weights.
        batch: inputs and labels.
    """

    model: flj.Model
    plain: flj.Model
    params: Any
    batch: tuple


def features(images: jax.Array, kernel: jax.Array | None) -> jax.Array:
    """The pixels themselves, or a convolution, whose per-example gradients XLA can't spread."""
    if kernel is not None:
        images = jnp.tanh(
            jax.lax.conv_general_dilated(
                images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return images.reshape(len(images), -1)


def predict(params: Any, images: jax.Array) -> jax.Array:
    """Two dense layers, with or without a convolution before them."""
    inputs = features(images, params.get("convolution"))
    return jnp.tanh(inputs @ params["one"] + params["bias"]) @ params["two"]


def predict_explicit(layout: str, params: Any, images: jax.Array) -> jax.Array:
    """The same for Explicit axes, where a product has to be told how to lie."""
    if layout == "full":
        params = jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params)
    examples = jax.typeof(images).sharding.spec[0]
    inputs = jax.sharding.auto_axes(features, out_sharding=P(examples, None))(
        images, params.get("convolution")
    )
    across = "model" if layout == "mixed" else None
    product = functools.partial(jnp.einsum, "ni,io->no")
    hidden = product(inputs, params["one"], out_sharding=P(examples, across)) + params["bias"]
    return product(jnp.tanh(hidden), params["two"], out_sharding=P(examples, None))


def make_mesh(kind: str) -> jax.sharding.Mesh:
    """Eight devices, four by two, with `auto` or `explicit` axes."""
    return jax.make_mesh(MESH, EVERYWHERE, axis_types=(MESHES[kind],) * 2)


def make_case(
    mesh: Any = None,
    layout: str = "data",
    dtype: str = "float64",
    seed: int = 0,
    network: str = "convolution",
) -> Case:
    """The network on a mesh, or on one device."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))

    def draw(*shape):
        return np.asarray(jax.random.normal(next(keys), shape, dtype))

    inputs, hidden, classes = SIZES
    params = {
        "one": draw(inputs, hidden) / inputs**0.5,
        "two": draw(hidden, classes) / hidden**0.5,
        "bias": 0.3 * draw(hidden),
    }
    if network == "convolution":
        params["convolution"] = draw(3, 3, IMAGE[-1], CHANNELS) / 4
    batch = draw(EXAMPLES, *IMAGE), np.arange(EXAMPLES) % classes
    plain = model = flj.Model(predict, flj.likelihoods.categorical())
    if mesh is None:
        return Case(model, plain, *jax.tree.map(jnp.asarray, (params, batch)))
    examples, *specs = LAYOUTS[layout]
    specs = dict(zip(params, specs, strict=False))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    if mesh.axis_types[0] == AxisType.Explicit:
        model = model._replace(predict=functools.partial(predict_explicit, layout))
    return Case(
        model, plain, jax.tree.map(put, params, specs), tuple(put(x, examples) for x in batch)
    )  # fmt: skip


def make_estimator(name: str, case: Case) -> flj.InverseFisher:
    """An estimate; FishLeg needs no per-example gradients, and takes the user's own model."""
    return ESTIMATORS[name](case.model if name == "fishleg" else case.plain)


class Pruned(NamedTuple):
    """What came of a pruning, on the host, and whether all of it lay where the weights did."""

    params: Any
    masks: Any
    placed: bool


def one_shot(name: str, case: Case, group: bool = False, stages: int = 2) -> Pruned:
    """`prune_one_shot`, by default in two stages."""
    compensation = flj.compensation.group(damping=0.1) if group else None
    result = flj.prune_one_shot(
        case.model, case.params, make_estimator(name, case), [case.batch, case.batch],
        sparsity=SPARSITY, stages=stages, compensation=compensation, key=jax.random.key(1),
    )  # fmt: skip
    return _pruned(result.params, result.masks, result.state, case)


def gradual(name: str, case: Case, steps: int = 8) -> Pruned:
    """A few steps of `gradual_prune`, of which two prune."""
    schedule = flj.schedules.cubic(SPARSITY, begin=5, end=8)
    pruning = flj.gradual_prune(
        make_estimator(name, case), schedule, model=case.model, aux_every=2, mask_every=3
    )
    tx = optax.chain(optax.sgd(0.05), pruning)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: flj.loss(case.model, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    params, state = case.params, tx.init(case.params)
    for _ in range(steps):
        params, state = step(params, state, case.batch)
    found = flj.check(state)
    if not found.ok:
        raise FloatingPointError(found.message)
    return _pruned(params, flj.masks(state), state[-1].estimate, case)


def _pruned(params: Any, masks: Any, state: Any, case: Case) -> Pruned:
    leaves = zip(*map(jax.tree.leaves, (case.params, params, masks)), strict=True)
    placed = all(p.sharding.is_equivalent_to(x.sharding, p.ndim)
                 for p, *others in leaves for x in others)  # fmt: skip
    # what has a parameter's shape has to lie where it does
    by_shape = {p.shape: p.sharding for p in jax.tree.leaves(case.params)}
    placed &= all(
        by_shape[x.shape].is_equivalent_to(x.sharding, x.ndim)
        for x in jax.tree.leaves(state) if x.shape in by_shape
    )  # fmt: skip
    return Pruned(*jax.tree.map(np.asarray, (params, masks)), placed)


def differences(one: Pruned, other: Pruned) -> tuple[int, float]:
    """How many masks differ, and the largest relative difference of weights that both keep."""
    masks = [list(map(np.ravel, jax.tree.leaves(x.masks))) for x in (one, other)]
    masks = [np.concatenate(x) for x in masks]
    weights = [np.concatenate(list(map(np.ravel, jax.tree.leaves(x.params)))) for x in (one, other)]
    both = masks[0] & masks[1]
    gap = np.abs(weights[0] - weights[1])[both] / np.maximum(np.abs(weights[0])[both], 1e-3)
    return int((masks[0] != masks[1]).sum()), float(gap.max(initial=0))


def moved(pruned: Pruned, case: Case) -> bool:
    """Whether any kept weight was changed: a stage may find that none of its step is any good."""
    trees = map(jax.tree.leaves, (pruned.params, case.params, pruned.masks))
    return any(
        np.any((new != np.asarray(old))[kept]) for new, old, kept in zip(*trees, strict=True)
    )


RUNS = 3  # of the model in an update, at most
GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(")


def all_gathers(text: str) -> Counter:
    """Types and shapes of the results of all-gathers in a compiled text; masks are `pred`.

    They are sorted and without ones; of gradients of all examples they are those of one gradient.
    """
    without = {"", "1", str(EXAMPLES), str(GRADIENTS)}
    found = [(kind, *sorted(int(n) for n in dims.split(",") if n not in without))
             for kind, dims in GATHER.findall(text)]  # fmt: skip
    return Counter(found)


def compiled(function: Callable, *args: Any) -> Counter:
    """The all-gathers of a function that is compiled for the devices on which arguments lie."""
    return all_gathers(jax.jit(function).lower(*args).compile().as_text())


def gathered(name: str, case: Case) -> dict[str, Counter]:
    """All-gathers of an estimate's functions and a Fisher product, beyond the model's own gradient.

    They are compiled as `fit` and `prune_one_shot` do.
    """
    return _gathered(name, case.params, case)


@_mesh.in_mesh_of_params
def _gathered(name: str, params: Any, case: Case) -> dict[str, Counter]:
    batch, estimator = case.batch, make_estimator(name, case)
    state, key = estimator.init(params), jax.random.key(2)
    gradient = compiled(jax.grad(lambda p, b: flj.loss(case.model, p, b)), params, batch)
    masks = jax.tree.map(lambda p: p > -0.1, params)
    kernels = lambda tree: [tree["one"], tree["two"]]
    found = {
        "update": compiled(estimator.update, state, params, batch, key, masks),
        "multiply": compiled(estimator.multiply, state, params, masks),
        "diagonal": compiled(estimator.diagonal, state, params, masks),
        "masks": compiled(
            lambda s, m: _keep(jax.tree.map(jnp.abs, s), m, 3000), kernels(params),
            kernels(masks),
        ),
    }  # fmt: skip
    # the weights that a gradient gathers, for labels and for the gradient or a Fisher product, and
    # the vector that this takes in their place
    own = Counter({k: RUNS * n for k, n in gradient.items()})
    found["update"] -= own
    if "convolution" in params and name != "fishleg":
        # of per-example gradients each device makes its own, with all weights, see `of_examples`
        found["update"] -= Counter(
            {(str(x.dtype)[0] + str(8 * x.dtype.itemsize), *sorted(x.shape)): 1
             for x in jax.tree.leaves(params)}
        )  # fmt: skip
    found["product"] = product(case) - own
    return found


def product(case: Case) -> Counter:
    """The all-gathers of a Fisher product, of which every iteration of a group update has one."""
    place = _placement.placement_like(case.params)
    static = fisher._product_sum, place, case.model, "exact", None
    run = functools.partial(_placement.placed, *static)
    return compiled(run, case.batch, jax.random.key(2), case.params, case.params)


def largest(found: dict[str, Counter]) -> int:
    """The numbers in the largest all-gather."""
    return max((math.prod(shape) for c in found.values() for _, *shape in c), default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sharding",
        description="Prune over eight virtual devices, and compare with one.",
    )
    several = lambda names: {
        "type": arguments.comma_list(arguments.one_of(names)), "default": list(names),
        "metavar": "A,B", "help": f"of {', '.join(names)}; default: all",
    }  # fmt: skip
    parser.add_argument("--estimator", **several(ESTIMATORS))
    parser.add_argument("--mesh", **several(MESHES))
    parser.add_argument("--layout", **several(LAYOUTS))
    parser.add_argument("--pruning", **several(("one_shot", "gradual", "group")))
    parser.add_argument("--network", choices=["convolution", "dense"], default="convolution")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float64")
    parser.add_argument("--seed", type=int, default=0, help="of the network and its data")
    parser.add_argument("--no-text", action="store_true", help="no compiled texts")
    args = parser.parse_args(argv)
    make_devices()
    jax.config.update("jax_enable_x64", args.dtype == "float64")
    return 0 if sweep(args) else 1


def make_devices() -> None:
    """Makes eight devices of this CPU, before JAX is used for anything.

    A device that waits for others keeps a thread of XLA's pool, of which there are as many as
    devices or cores.  Where all of them wait the one that is waited for has none, and the process
    ends after 40 seconds (seen twice, on two busy cores); `NPROC` is how many there are at least.
    """
    os.environ["NPROC"] = str(8 * DEVICES)
    jax.config.update("jax_num_cpu_devices", DEVICES)


HOW = {
    "one_shot": one_shot,
    "group": functools.partial(one_shot, group=True),
    "gradual": gradual,
}


def sweep(args: argparse.Namespace) -> bool:
    """Prints a line for every combination, and whether all are as they have to be."""
    sound = True
    for name in args.estimator:
        single = make_case(dtype=args.dtype, seed=args.seed, network=args.network)
        expected = {how: HOW[how](name, single) for how in args.pruning}
        for kind, layout in itertools.product(args.mesh, args.layout):
            mesh = make_mesh(kind)
            with jax.set_mesh(mesh):
                case = make_case(mesh, layout, args.dtype, args.seed, args.network)
                cells, good = [], True
                for how in args.pruning:
                    found = HOW[how](name, case)
                    masks, weights = differences(found, expected[how])
                    good &= masks == 0 and weights <= TOLERANCES[args.dtype] and found.placed
                    cells.append(f"{how}: {masks} masks, {weights:.1e}, "
                                 f"{'placed' if found.placed else 'MOVED'}")  # fmt: skip
                    if how == "group" and not moved(expected[how], single):
                        cells.append("no step, so that weights say nothing")
                if not args.no_text:
                    gathers = gathered(name, case)
                    size = largest(gathers)
                    good &= layout == "data" or size < SMALLEST_KERNEL
                    worst = {f: dict(c) for f, c in gathers.items() if c}
                    cells.append(f"all-gather {size} {worst if size >= SMALLEST_KERNEL else ''}")
            sound &= good
            print(
                f"{name:10} {kind:8} {layout:5} {'ok ' if good else 'BAD'}",
                "; ".join(cells),
                flush=True,
            )
    return sound


if __name__ == "__main__":
    sys.exit(main())
