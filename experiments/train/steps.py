"""Compiled training steps, shared by the trials of learning rates and the trainings."""

import math
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import datasets
from experiments.data.batches import batch_at
from experiments.models.specs import Spec, as_batch
from experiments.models.training import loss_of
from experiments.train import optimizers
from experiments.train.pruning import Goal

# compiled once for each model; a bound method would be compiled with every call
init_weights = jax.jit(Spec.init, static_argnums=0)
LOOK_EVERY = 20  # steps between looks at the loss, which end a training that has diverged


class Carry(NamedTuple):
    """Everything that the next step depends on, but for its number and the data."""

    params: Any
    constants: Any
    state: Any


class Stretch(NamedTuple):
    """Some steps of a training.

    Attributes:
        carry: The carry after the last step.
        seconds: Seconds on the clock, without compilation.
        process_seconds: CPU seconds of all threads, without compilation.
        diverged: Whether a loss was not finite, at which the training ends.
    """

    carry: Carry
    seconds: float
    process_seconds: float
    diverged: bool


def cosine(rate: jax.Array | float, length: jax.Array | int) -> optax.Schedule:
    """The schedule of all optimisers: half a cosine, from `rate` to zero after `length` steps.

    `optax.cosine_decay_schedule` takes no traced numbers, with which one compilation serves all.
    """
    return lambda step: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(step / length, 1))) / 2


class Program:
    """The compiled steps of one optimiser, for all learning rates and lengths.

    Attributes:
        spec: The model.
        name: The optimiser, a name in `optimizers.OPTIMIZERS`.
        batch: Examples in a step.
        goal: Sparsity that is reached on the way, or None.
    """

    def __init__(self, spec: Spec, name: str, decay: float, batch: int, goal: Goal | None = None):
        """Compiles the initial state; steps follow in `prepare`."""
        self.spec, self.name, self.batch, self.goal = spec, name, batch, goal
        self.decay = decay
        gradient = jax.value_and_grad(loss_of(spec), has_aux=True)

        def make(rate, length):
            return self.transformation(cosine(rate, length))

        def step(rate, length, carry, inputs, targets, work):
            params, constants, state = carry
            (loss, new), grads = gradient(params, constants, inputs, targets)
            extra = {"batch": as_batch(inputs, targets, constants), **dict(work)}
            updates, state = make(rate, length).update(grads, state, params, **extra)
            return Carry(optax.apply_updates(params, updates), new, state), loss

        self._step = jax.jit(step, donate_argnums=2, static_argnames="work")
        params, constants = jax.eval_shape(spec.init, jax.random.key(0))
        init = make(1.0, 1).init
        self._init = jax.jit(init).lower(params).compile()
        self._shapes = Carry(params, constants, jax.eval_shape(init, params))
        self._compiled = {}

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """The optimiser with a learning rate that is a function of the step."""
        return optimizers.make(self.spec, self.name, rate, self.decay, self.goal)

    def start(self, seed: int) -> Carry:
        """The carry before the first step, with random weights of this seed."""
        params, constants = init_weights(self.spec, jax.random.key(seed))
        return Carry(params, constants, self._init(params))

    def prepare(self, steps: Iterable[int]) -> None:
        """Compiles for steps of these numbers, counted from 1, where that was not done before."""
        inputs, targets = _example(self.spec, self.batch)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        for work in sorted(set(map(self._work, steps)) - set(self._compiled)):
            lowered = self._step.lower(number, number, self._shapes, inputs, targets, work=work)
            self._compiled[work] = lowered.compile()

    def run(
        self,
        train: datasets.Arrays,
        carry: Carry,
        steps: range,
        *,
        rate: float,
        length: int,
        seed: int,
    ) -> Stretch:
        """Trains for some steps.

        Args:
            train: Training inputs and targets.
            carry: The carry before the first step, whose memory is taken.
            steps: Numbers of the steps, counted from 1.
            rate: Learning rate at the beginning of the schedule.
            length: Number of steps after which the schedule is at zero.
            seed: Seed of the order of the examples.
        """
        self.prepare(steps)
        jax.block_until_ready(carry)
        numbers = np.float32(rate), np.float32(length)
        clock, processor, diverged = time.perf_counter(), time.process_time(), False
        for n in steps:
            name = self.spec.dataset
            batch = batch_at(name, train, seed=seed, step=n - 1, batch=self.batch)
            carry, loss = self._compiled[self._work(n)](*numbers, carry, *batch)
            if n % LOOK_EVERY == 0 or n == steps[-1]:
                diverged = not math.isfinite(loss)
                if diverged:
                    break
        jax.block_until_ready(carry)
        seconds = time.perf_counter() - clock, time.process_time() - processor
        return Stretch(carry, *seconds, diverged)

    def _work(self, step: int) -> tuple[tuple[str, bool], ...]:
        return tuple(optimizers.work(self.name, self.goal, step).items())


@lru_cache(maxsize=16)
def program(spec: Spec, name: str, decay: float, batch: int, goal: Goal | None = None) -> Program:
    """The `Program` with these arguments, made once."""
    return Program(spec, name, decay, batch, goal)


def _example(spec: Spec, batch: int) -> tuple[Any, Any]:
    """Shapes of the inputs and targets of a batch."""
    inputs = jax.ShapeDtypeStruct((batch, *spec.input_shape), spec.input_dtype)
    if spec.mean is not None:
        pixels = math.prod(spec.input_shape)
        return inputs, jax.ShapeDtypeStruct((batch, pixels), jnp.float32)
    labels = spec.input_shape if spec.input_dtype == jnp.int32 else ()  # of texts, each character
    return inputs, jax.ShapeDtypeStruct((batch, *labels), jnp.int32)
