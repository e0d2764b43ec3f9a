"""One gradual pruning: training steps with masks that grow, kept on disk so that it can go on."""

import math
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.data import datasets
from experiments.data.batches import batch_at
from experiments.gradual.plans import DENSE, Plan, make_optimizer, make_pruning, work_of
from experiments.models.specs import Spec, as_batch
from experiments.models.training import loss_of
from experiments.running import memory, metrics, processes
from experiments.running.checkpointing import Checkpoints

LOG_EVERY = 10  # steps
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
TOLD = ("auxiliary_loss", "relative_residual", "damping")  # of those estimates that have them


class Carry(NamedTuple):
    """All that the next step depends on, but for its number, and the seconds until here."""

    params: Any
    constants: Any
    state: Any
    seconds: np.ndarray


class Memory(NamedTuple):
    """Bytes on one device, with the names that they have in `results.json`.

    Attributes:
        predicted_memory_bytes: what the largest of the compiled steps takes with its arguments:
            weights, state and a batch.
        peak_memory_bytes: what was taken above what was taken before the run, or before what is
            left of one that goes on; on a CPU checkpoints that are written count, too.  None where
            that can't be known.
    """

    predicted_memory_bytes: int
    peak_memory_bytes: int | None


@lru_cache(maxsize=64)
def compiled_step(spec: Spec, plan: Plan, work: tuple[tuple[str, bool], ...]) -> Callable:
    """A step, compiled before the clock starts; seeds share it.

    Args:
        spec: the model.
        plan: the plan of the run.
        work: the result of `work_of` for the step, as pairs.

    Returns:
        A function `(params, constants, state, inputs, targets) -> (params, constants, state, told)`
        that takes the memory of the first three; what is told goes into `metrics.jsonl`.
    """
    gradient = jax.value_and_grad(loss_of(spec), has_aux=True)
    tx = transformation(spec, plan, seed=0)

    def step(params, constants, state, inputs, targets):
        (loss, new_constants), grads = gradient(params, constants, inputs, targets)
        extra = {}
        if plan.method != DENSE:
            extra = {"batch": as_batch(inputs, targets, constants), **dict(work)}
        updates, state = tx.update(grads, state, params, **extra)
        told = {"loss": loss}
        if plan.method != DENSE:
            pruning = state[-1]
            weights = sum(number.sum() for number in pruning.weights.values())
            told["sparsity"] = pruning.pruned.sum() / weights
            estimate = pruning.estimate
            told |= {name: getattr(estimate, name) for name in TOLD if hasattr(estimate, name)}
        return optax.apply_updates(params, updates), new_constants, state, told

    params, constants = jax.eval_shape(spec.init, jax.random.key(0))
    state = jax.eval_shape(tx.init, params)
    inputs = jax.ShapeDtypeStruct((plan.batch, *spec.input_shape), spec.input_dtype)
    targets = jax.ShapeDtypeStruct((plan.batch,), jnp.int32)
    if spec.mean is not None:
        targets = jax.ShapeDtypeStruct((plan.batch, math.prod(spec.input_shape)), jnp.float32)
    own, cut = processes.on_all(), processes.by_example()
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1, 2),
        in_shardings=(own, own, own, cut, cut),
        out_shardings=own,
    )
    return jitted.lower(params, constants, state, inputs, targets).compile()


def transformation(spec: Spec, plan: Plan, seed: int) -> optax.GradientTransformationExtraArgs:
    """The optimiser with the pruning behind it."""
    return optax.chain(make_optimizer(plan), make_pruning(spec, plan, seed))


def run(
    spec: Spec,
    plan: Plan,
    train: datasets.Arrays,
    start: tuple[Any, Any],
    *,
    seed: int,
    folder: Path,
    checkpoint_every: float,
) -> tuple[Carry, Memory]:
    """Trains a network while it is pruned, or goes on with that.

    What a step does follows from the carry and its number alone, so that a run that was killed
    ends with the weights that it would have had.  What it is going to take of memory is printed
    before the first step, and beside what it took after the last.

    Args:
        spec: the model.
        plan: the plan of the run.
        train: the training inputs and targets.
        start: the parameters and constants of the trained network.
        seed: of the order of the examples, of shifts and flips, and of the estimate.
        folder: for `metrics.jsonl`, of every tenth step, and for the checkpoints, which are
            deleted by who has found a better place for what is returned.
        checkpoint_every: seconds between two checkpoints.

    Returns:
        The carry after the last step, whose seconds are without compilation and checkpoints, and
        the memory.
    """
    works = [tuple(work_of(plan, n).items()) for n in range(1, plan.recipe.steps + 1)]
    steps = {work: compiled_step(spec, plan, work) for work in sorted(set(works))}
    predicted = max(map(memory.planned, steps.values()))
    title = f"{plan.method} to {100 * plan.sparsity:g} %, seed {seed}"
    print(f"{title}: a run is predicted to take {predicted / 1e6:.0f} MB", flush=True)
    init = jax.jit(transformation(spec, plan, seed).init, out_shardings=processes.on_all())
    init = init.lower(start[0]).compile()  # before anybody looks at the memory
    folder.mkdir(parents=True, exist_ok=True)
    processes.wait(str(folder))
    with memory.watch() as peak, Checkpoints(folder / CHECKPOINTS) as kept:
        params, constants = jax.tree.map(jnp.array, start)  # a copy: steps take their memory
        carry = Carry(params, constants, init(params), np.zeros(()))
        done, carry = kept.restore(carry) or (0, carry)
        metrics.rewind(folder / METRICS, done)
        with tqdm(desc=title, total=len(works), initial=done, disable=None) as bar:
            told, begin = [], time.perf_counter()
            for step in range(done + 1, len(works) + 1):
                batch = batch_at(spec.dataset, train, seed=seed, step=step - 1, batch=plan.batch)
                *others, now = steps[works[step - 1]](*carry[:3], *batch)
                carry = Carry(*others, carry.seconds)
                if step % LOG_EVERY == 0 or step == len(works):
                    told.append({"step": step, **now})
                bar.update()
                due = time.perf_counter() - begin > checkpoint_every
                if processes.several():  # all save at the same step
                    due = step % LOG_EVERY == 0 and processes.agreed(due)
                if due or step == len(works):
                    jax.block_until_ready(carry)
                    seconds = carry.seconds + (time.perf_counter() - begin)
                    carry = carry._replace(seconds=seconds)
                    lines = jax.tree.map(lambda x: np.asarray(x).item(), told)
                    metrics.append(folder / METRICS, lines)
                    kept.save(step, carry)
                    told, begin = [], time.perf_counter()
        measured = peak()
    print(memory.told(title, predicted, measured, of="run"), flush=True)
    return carry, Memory(predicted, measured)
