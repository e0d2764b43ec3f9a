"""Sets an inverse Fisher that is carried through a gradual pruning beside one that is made anew.

    python -m experiments.assimilation
    python -m experiments.assimilation --dataset mnist

A network is pruned by `fishleg_prune` while it is trained.  At every mask update, before it, the
relative residual `‖F_γQu − u‖ / ‖u‖` over surviving weights is measured on the same probes and the
same training images for three estimates of one structure and damping: the one that is carried on
and refined (`carried`); one that starts from nothing after every mask update and has seen the same
batches since (`renewed`); and the first one as it was when it began to be used (`kept`).  Writes
`assimilation.json` and `assimilation.png` into `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import fishleg_jax as flj
from experiments.convergence import sampler
from experiments.data.batches import batch_at
from experiments.data.datasets import Data
from experiments.gradual import __main__ as gradual
from experiments.gradual import loop, plans
from experiments.gradual.plans import START, Plan, assimilates
from experiments.models.cases import curvature_batches
from experiments.models.specs import Spec, as_batch
from experiments.report import plots, tables
from experiments.running import arguments, files, processes

PROBES, EXAMPLES = 4, 1000
NAMES = ("carried", "renewed", "kept")
COLUMNS = {"step": "{step}", "sparsity": "{sparsity:.1%}"} | {n: f"{{{n}:.2f}}" for n in NAMES}


def _measurer(spec: Spec, batch: tuple, seed: int):
    """The mean relative residual of a state over some probes."""
    sample = sampler(spec.model, flj.inverse.fishleg(spec.model))
    keys = jax.random.split(jax.random.key(seed), PROBES)

    def measure(state: Any, params: Any, masks: Any) -> float:
        residuals = [sample(state, params, batch, key, masks)[1] for key in keys]
        return float(sum(residuals) / PROBES)

    return measure


def follow(
    spec: Spec, plan: Plan, split: Data, start: tuple[Any, Any], seed: int
) -> list[dict[str, float]]:
    """Prunes, and measures at every mask update.

    Args:
        spec: the model.
        plan: of a pruning by FishLeg.
        split: the data set; its training images are used.
        start: the parameters and constants of the trained network.
        seed: of the order of the examples, the probes and the estimates.

    Returns:
        For every mask update its step, the sparsity before it, and the residuals.
    """
    works = {yes: (("assimilate", yes),) for yes in (False, True)}
    steps = {yes: loop.compiled_step(spec, plan, work) for yes, work in works.items()}
    every = plan.recipe.mask_every
    seen = max(every // plan.recipe.aux_every, 3)
    params, constants = jax.tree.map(jnp.array, start)
    init = loop.transformation(spec, plan, seed).init
    state = jax.jit(init, out_shardings=processes.on_all())(params)
    [batch] = curvature_batches(
        split.train, constants, examples=EXAMPLES, batch_size=EXAMPLES, seed=seed
    )
    measure = _measurer(spec, batch, seed)
    renewing = update = kept = renewed = None
    rows = []
    for step in tqdm(range(1, plan.end + 1), desc=spec.name, disable=None):
        inputs, targets = batch_at(
            spec.dataset, split.train, seed=seed, step=step - 1, batch=plan.batch
        )
        yes = assimilates(plan, step)
        if kept is not None and yes:
            key = jax.random.fold_in(jax.random.key(seed + 1), step)
            images = as_batch(inputs, targets, constants)
            renewed = update(renewed, params, images, key, flj.masks(state))
        if kept is not None and step % every == 0:
            masks = flj.masks(state)
            states = {"carried": state[-1].estimate, "renewed": renewed, "kept": kept}
            rows.append(
                {
                    "step": step,
                    "sparsity": float(state[-1].asked),
                    **{name: measure(s, params, masks) for name, s in states.items()},
                }
            )
        params, constants, state, _ = steps[yes](params, constants, state, inputs, targets)
        # when FishLeg's start is over, and a mask update is
        if kept is None and step % every == 0 and step >= max(plan.begin, START):
            kept = jax.tree.map(jnp.copy, state[-1].estimate)
            damping = float(kept.damping)
            renewing = flj.inverse.fishleg(spec.model, damping, updates=seen)
            update = jax.jit(renewing.update)
        if kept is not None and step % every == 0:
            renewed = renewing.init(params)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.pruning_parser(
        "experiments.assimilation",
        "Measure a carried inverse Fisher against one that is made anew.",
        methods=("fishleg",),
        default=("fishleg",),
        several=False,
        models=tuple(plans.RECIPES),
        limited=False,
        scratch=True,
    )
    plans.add_options(parser)
    processes.add_options(parser)

    def check(args: argparse.Namespace, spec: Spec, split: Data) -> None:
        plans.make_plan(spec, args, "fishleg", args.sparsity)

    with processes.joined(parser, argv):
        args, spec, split, loaded = arguments.parse(parser, argv, check)
        args.validate = None
        plan = plans.make_plan(spec, args, "fishleg", args.sparsity)
        start = gradual.start_weights(args, spec, split, loaded, args.seed)
        rows = follow(spec, plan, split, processes.everywhere(start), args.seed)
        print(tables.of_rows(rows, COLUMNS))
        print(files.write_json(args.out / "assimilation.json", rows))
        print(plots.assimilation(args.out / "assimilation.png", spec.name, rows, NAMES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
