"""Looks whether pruned weights stay 0.0, step after step, whatever the optimiser.

    python -m experiments.zeros

A perceptron on the digits is pruned to 95 % by `fishleg_prune` at the end of an optax chain, and
trained on for 10,000 steps, after each of which every pruned weight is looked at.  What
schedule-free hands out for evaluation are weights of its own, of which zero is promised once
`apply_masks` was called: these are looked at too.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import fishleg_jax as flj
from experiments.data import datasets
from experiments.data.batches import rows
from experiments.models.specs import MODELS
from experiments.report import tables
from experiments.running import arguments

SPEC = MODELS["mlp"]
BEGIN, END, AT_ONCE = 100, 400, 100  # steps
SPARSITY = 0.95
COLUMNS = {
    "optimizer": "{optimizer}",
    "pruned": "{pruned:,}",
    "steps after": "{steps:,}",
    "not 0.0": "{not_zero:,}",
    "not 0.0 before": "{not_zero_before:,}",
    "check counted": "{violations:,}",
}

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3, weight_decay=1e-2),
    "sgd, momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-4, weight_decay=1e-2),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-3),
}


def _handed_out(name: str, params: Any, state: Any) -> list[Any]:
    """The weights that a user would take: of schedule-free the averaged ones too."""
    if name != "schedule-free":
        return [params]
    averaged = optax.contrib.schedule_free_eval_params(state[0], params)
    return [params, flj.apply_masks(averaged, state)]


def _trainer(name: str) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """The chain, and a function of many steps that counts nonzero pruned weights after each."""
    schedule = flj.schedules.cubic(SPARSITY, begin=BEGIN, end=END)
    tx = optax.chain(OPTIMIZERS[name](), flj.fishleg_prune(SPEC.model, schedule))

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(partial(flj.loss, SPEC.model))(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        found = [
            jnp.sum(~m & (x != 0))
            for weights in _handed_out(name, params, state)
            for x, m in zip(*map(jax.tree.leaves, (weights, flj.masks(state))), strict=True)
        ]
        return (params, state), sum(found)

    @jax.jit
    def steps(carry, inputs, targets, order):
        return jax.lax.scan(lambda c, i: step(c, (inputs[i], targets[i])), carry, order)

    return tx, steps


def measure(name: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """Prunes, and trains on.

    Args:
        name: in `OPTIMIZERS`.
        steps: number of steps after the last mask update, rounded up to hundreds.
        seed: for the weights and the order of the images.

    Returns:
        The number of pruned weights, how many times one of them was not 0.0 after the last mask
        update and before, and the count of `check`.
    """
    inputs, targets = map(jnp.asarray, datasets.digits().train)
    tx, trainer = _trainer(name)
    params, _ = SPEC.init(jax.random.key(seed))
    carry, found = (params, tx.init(params)), []
    with tqdm(total=END + steps, desc=name, disable=None) as bar:
        for begin in range(0, END + steps, AT_ONCE):
            order = np.stack(
                [rows(seed, begin + i, len(inputs), SPEC.train_batch) for i in range(AT_ONCE)]
            )
            carry, wrong = trainer(carry, inputs, targets, order)
            found.append(np.asarray(wrong))
            bar.update(AT_ONCE)
    found = np.concatenate(found)
    masks = jax.tree.leaves(flj.masks(carry[1]))
    return {
        "optimizer": name,
        "pruned": sum(int((~m).sum()) for m in masks),
        "steps": len(found) - END,
        "not_zero": int(found[END:].sum()),
        "not_zero_before": int(found[:END].sum()),
        "violations": flj.check(carry[1]).violations,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code: 1 where a pruned weight was not 0.0.
    """
    parser = arguments.command("experiments.zeros", "Do pruned weights stay 0.0?")
    arguments.option(parser, "--steps", arguments.at_least(1), 10_000, "after the last mask update")
    args = parser.parse_args(argv)
    results = [measure(name, args.steps) for name in OPTIMIZERS]
    print(tables.of_rows(results, COLUMNS))
    return int(any(row["not_zero"] or row["not_zero_before"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
