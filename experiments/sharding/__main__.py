"""Prunes a small network sharded over eight devices of the CPU, and compares with one device.

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
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fishleg_jax as flj
from experiments.running import arguments
from experiments.sharding.case import (
    ESTIMATORS,
    LAYOUTS,
    MESHES,
    SMALLEST_KERNEL,
    Case,
    make_case,
    make_devices,
    make_estimator,
    make_mesh,
)
from experiments.sharding.text import gathered, largest

SPARSITY = 0.6
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}  # of weights; masks are to be the same
# unchecked, or a stage may find that no step is any good, and its weights would say nothing
GROUP = flj.compensation.group(damping=0.1, check_step=False)


class Pruned(NamedTuple):
    """The result of a pruning, on the host, and whether all of it lay where the weights did."""

    params: Any
    masks: Any
    placed: bool


def one_shot(name: str, case: Case, compensation: Any = None, stages: int = 2) -> Pruned:
    """`prune_one_shot`, by default in two stages."""
    result = flj.prune_one_shot(
        case.model,
        case.params,
        make_estimator(name, case),
        [case.batch, case.batch],
        sparsity=SPARSITY,
        stages=stages,
        compensation=compensation,
        key=jax.random.key(1),
    )
    return _pruned(result.params, result.masks, result.state, case)


def gradual(name: str, case: Case, steps: int = 8) -> Pruned:
    """A few steps of `gradual_prune`, two of them with a mask update."""
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
    placed = all(
        p.sharding.is_equivalent_to(x.sharding, p.ndim) for p, *others in leaves for x in others
    )
    # what has a parameter's shape has to lie where it does
    by_shape = {p.shape: p.sharding for p in jax.tree.leaves(case.params)}
    placed &= all(
        by_shape[x.shape].is_equivalent_to(x.sharding, x.ndim)
        for x in jax.tree.leaves(state)
        if x.shape in by_shape
    )
    return Pruned(*jax.tree.map(np.asarray, (params, masks)), placed)


def differences(one: Pruned, other: Pruned) -> tuple[int, float]:
    """How many masks differ, and the largest relative difference of weights that both keep."""
    masks = [list(map(np.ravel, jax.tree.leaves(x.masks))) for x in (one, other)]
    masks = [np.concatenate(x) for x in masks]
    weights = [np.concatenate(list(map(np.ravel, jax.tree.leaves(x.params)))) for x in (one, other)]
    both = masks[0] & masks[1]
    gap = np.abs(weights[0] - weights[1])[both] / np.maximum(np.abs(weights[0])[both], 1e-3)
    return int((masks[0] != masks[1]).sum()), float(gap.max(initial=0))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command(
        "experiments.sharding", "Prune over eight virtual devices, and compare with one."
    )

    def several(name: str, names: Collection[str]) -> None:
        arguments.option(parser, name, arguments.one_of(names), list(names), several=True)

    several("--estimator", ESTIMATORS)
    several("--mesh", MESHES)
    several("--layout", LAYOUTS)
    several("--pruning", ("one_shot", "gradual", "group"))
    parser.add_argument("--network", choices=["convolution", "dense"], default="convolution")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float64")
    arguments.option(parser, "--seed", int, 0, "of the network and its data")
    parser.add_argument("--no-text", action="store_true", help="no compiled texts")
    args = parser.parse_args(argv)
    make_devices()
    jax.config.update("jax_enable_x64", args.dtype == "float64")
    return 0 if sweep(args) else 1


HOW = {
    "one_shot": one_shot,
    "group": functools.partial(one_shot, compensation=GROUP),
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
                    cells.append(
                        f"{how}: {masks} masks, {weights:.1e}, "
                        f"{'placed' if found.placed else 'MOVED'}"
                    )
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
