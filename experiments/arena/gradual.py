"""One cell of the arena while a network is trained on: a short gradual pruning."""

import time
from typing import Any, NamedTuple

import jax
import optax

import fishleg_jax as flj
from experiments.arena.contestants import ARGUMENTS, OURS, make_estimator, prunable
from experiments.arena.networks import Contestant
from experiments.arena.one_shot import BATCH
from experiments.data.batches import batch_at
from experiments.gradual.plans import START, told
from experiments.models.specs import Spec, as_batch
from experiments.models.training import loss_of, model_in_training

RATE = 5e-4  # of Adam, constant, for every network
MASK_UPDATES, LAST = 10, 8  # mask updates fit into a run; the last one that prunes


class Plan(NamedTuple):
    """When masks and estimates change; the same for every method.

    Attributes:
        steps: number of training steps.
        begin: the step before the first mask update: all estimates are made by then.
        mask_every: steps between mask updates.
        end: the step at which the sparsity is reached.
        aux_every: steps between two batches that an estimate sees, after its start.
    """

    steps: int
    begin: int
    mask_every: int
    end: int
    aux_every: int

    def assimilates(self, step: int) -> bool:
        """Whether estimates see the batch of a step, which is counted from one."""
        return step <= START or (step <= self.end and step % self.aux_every == 0)

    def due(self, step: int) -> bool:
        """Whether masks may change at a step."""
        return self.begin < step <= self.end and step % self.mask_every == 0


def make_plan(steps: int) -> Plan:
    """The plan of a run.

    Args:
        steps: number of training steps, a multiple of 10.

    Raises:
        ValueError: it is none, or so few that the pruning would begin after its end.
    """
    every = steps // MASK_UPDATES
    plan = Plan(steps, START, every, LAST * every, max(1, every // 2))
    if steps % MASK_UPDATES or plan.begin + every > plan.end:
        raise ValueError(f"{steps} steps are not a multiple of {MASK_UPDATES}, or less than 50")
    return plan


def _transformation(method: str, spec: Spec, plan: Plan, sparsity: float, seed: int):
    common = {
        **ARGUMENTS[method].gradual,
        **prunable(spec),
        "aux_every": plan.aux_every,
        "mask_every": plan.mask_every,
        "training_model": model_in_training(spec),
        "seed": seed,
    }
    schedule = flj.schedules.cubic(sparsity, begin=plan.begin, end=plan.end)
    if method == OURS and not ARGUMENTS[method].estimator:
        pruning = flj.fishleg_prune(spec.model, schedule, **common)
    else:
        estimator = make_estimator(method, spec, START * BATCH)
        pruning = flj.gradual_prune(estimator, schedule, model=spec.model, **common)
    return optax.chain(optax.adam(RATE), pruning)


def prune(
    method: str, network: Contestant, sparsity: float, *, steps: int, seed: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Trains a network on while one method prunes it.

    Args:
        method: a name in `ARGUMENTS`.
        network: the trained network.
        sparsity: the final one.
        steps: number of training steps.
        seed: for the order of the examples and the method's random numbers.

    Returns:
        The pruned parameters, the constants, and fields for `results.json`.
    """
    spec, plan = network.spec, make_plan(steps)
    begin, cpu = time.perf_counter(), time.process_time()
    tx = _transformation(method, spec, plan, sparsity, seed)
    gradient = jax.grad(loss_of(spec), has_aux=True)

    def step(params, constants, state, inputs, targets, assimilate=None, hold=False):
        grads, new = gradient(params, constants, inputs, targets)
        work = {"batch": as_batch(inputs, targets, constants), "assimilate": assimilate}
        updates, state = tx.update(grads, state, params, hold=hold, **work)
        return optax.apply_updates(params, updates), new, state

    # a branch of a program would be slow on a CPU, so there is a program for each kind of step
    step = jax.jit(step, static_argnames=("assimilate", "hold"))
    params, constants, state = network.params, network.constants, jax.jit(tx.init)(network.params)
    for n in range(1, steps + 1):
        batch = batch_at(spec.dataset, network.split.train, seed=seed, step=n - 1, batch=BATCH)
        sees = method != "magnitude" and plan.assimilates(n)
        params, constants, state = step(params, constants, state, *batch, **told(sees, plan.due(n)))
    jax.block_until_ready(params)
    found = flj.check(state)
    fields = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "violations": found.violations,
        "failures": found.failures,
    }
    return params, constants, fields
