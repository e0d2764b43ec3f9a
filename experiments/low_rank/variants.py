"""Optimisers whose state is small: Adam in subspaces of gradients, or of an earlier trajectory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models.specs import Spec
from experiments.train.steps import Carry, Program

ADAM = "adam"


class Variant(NamedTuple):
    """Arguments of `flj.low_rank_updates` around Adam.

    Attributes:
        rank: Share of the smaller side of each kernel.
        refresh: Steps between refreshes.
        residual: Whether the rest of the gradient is added.
        subspaces: Number of subspaces of a kernel.
    """

    rank: float
    refresh: int
    residual: bool = True
    subspaces: int = 1

    @property
    def name(self) -> str:
        """Name in tables and folders."""
        parts = [f"low rank {100 * self.rank:.3g} %", f"refreshed every {self.refresh}"]
        parts += [f"{self.subspaces} subspaces"] if self.subspaces > 1 else []
        parts += [] if self.residual else ["without the rest"]
        return ", ".join(parts)


class _OwnProgram(Program):
    """The compiled steps of an optimiser that is not in the table of `experiments.train`."""

    def _work(self, step: int) -> tuple[tuple[str, bool], ...]:
        del step
        return ()


class LowRankProgram(_OwnProgram):
    """The compiled steps of Adam in subspaces of the gradients."""

    def __init__(self, spec: Spec, variant: Variant, batch: int):
        """Compiles the initial state, see `Program`."""
        self.variant = variant
        super().__init__(spec, variant.name, 0.0, batch)

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """The optimiser with a learning rate that is a function of the step."""
        low = flj.low_rank_updates(optax.scale_by_adam(), **self.variant._asdict())
        return optax.chain(low, optax.scale_by_learning_rate(rate))


class Trajectory(NamedTuple):
    """An earlier training with Adam, whose directions a later one is confined to.

    Attributes:
        rate: Its learning rate.
        length: Steps of its schedule; the first half is sampled.
        directions: Number of directions.
    """

    rate: float
    length: int
    directions: int

    @property
    def name(self) -> str:
        """Name in tables and folders."""
        return f"within {self.directions} directions of Adam's first half"


class TrajectoryProgram(_OwnProgram):
    """The compiled steps of Adam on coordinates in the subspace of an earlier training.

    The training begins at the same weights as the earlier one.  Steps are as long as Adam's on all
    weights, so that learning rates compare.
    """

    def __init__(self, spec: Spec, trajectory: Trajectory, batch: int, train: datasets.Arrays):
        """Compiles the initial state; `train` are the examples of the earlier training."""
        self.trajectory, self._train = trajectory, train
        params, _ = jax.eval_shape(spec.init, jax.random.key(0))
        self._empty = jax.tree.map(
            lambda x: np.zeros((trajectory.directions, *x.shape), x.dtype), params
        )
        self._weights = sum(x.size for x in jax.tree.leaves(params))
        super().__init__(spec, trajectory.name, 0.0, batch)

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        """The optimiser with a learning rate that is a function of the step."""
        longer = (self._weights / self.trajectory.directions) ** 0.5
        within = optax.chain(optax.scale_by_adam(), optax.scale(longer))
        basis = jax.tree.map(jnp.asarray, self._empty)
        return optax.chain(flj.within_subspace(within, basis), optax.scale_by_learning_rate(rate))

    def start(self, seed: int) -> Carry:
        """The carry before the first step, with the subspace of an earlier training."""
        carry = super().start(seed)
        first, *others = carry.state
        basis = self._basis(seed)
        return carry._replace(state=(first._replace(basis=basis), *others))

    def _basis(self, seed: int) -> Any:
        """Directions of the first half of a training with Adam, sampled at equal distances."""
        rate, length, directions = self.trajectory
        adam = Program(self.spec, ADAM, 0.0, self.batch)
        carry, samples = adam.start(seed), []
        each = max(1, length // 2 // (2 * directions))
        for begin in range(0, 2 * directions * each, each):
            samples.append(jax.tree.map(np.array, carry.params))
            steps = range(begin + 1, begin + each + 1)
            done = adam.run(self._train, carry, steps, rate=rate, length=length, seed=seed)
            carry = done.carry
        samples.append(jax.tree.map(np.array, carry.params))
        return flj.trajectory_subspace(samples, directions)
