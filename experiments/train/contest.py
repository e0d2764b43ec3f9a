"""Trainings of several optimisers, epoch by epoch in turn, so that their seconds compare."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import training
from experiments.models.specs import Spec
from experiments.running import files, metrics
from experiments.running.checkpointing import Checkpoints
from experiments.running.runner import Runner
from experiments.train.steps import Program

SUBSET = 10_000  # training examples, at most, on which the training loss is measured
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


def score_name(spec: Spec) -> str:
    """The field with the quality of a network on test examples."""
    return "accuracy" if spec.mean is None else "reconstruction_error"


def subset(train: datasets.Arrays) -> datasets.Arrays:
    """The training examples on which the training loss is measured, always the same ones."""
    order = np.random.default_rng(0).permutation(len(train[0]))
    rows = np.sort(order[:SUBSET])
    return train[0][rows], train[1][rows]


class Training:
    """The training of one optimiser, which goes on from its last checkpoint.

    Attributes:
        program: Compiled steps of the optimiser.
        epochs: Number of epochs wanted.
        history: An object for each epoch made, as in `metrics.jsonl`.
        carry: The carry after the last of them.
    """

    def __init__(
        self,
        program: Program,
        split: datasets.Data,
        *,
        rate: float,
        epochs: int,
        seed: int,
        folder: Path,
        checkpoint_every: float,
    ):
        """Starts with random weights, or at the last checkpoint in the folder.

        Args:
            program: Compiled steps of the optimiser.
            split: The data set.
            rate: Learning rate at the beginning of the schedule.
            epochs: Number of epochs, the length of the schedule.
            seed: Seed of the weights and of the order of the examples.
            folder: Folder for `metrics.jsonl` and the checkpoints.
            checkpoint_every: Seconds between two checkpoints, at ends of epochs.
        """
        self.program, self._split, self._subset = program, split, subset(split.train)
        self._rate, self.epochs, self._seed = rate, epochs, seed
        self._each = len(split.train[0]) // program.batch
        self.folder, self._every = folder, checkpoint_every
        folder.mkdir(parents=True, exist_ok=True)
        start = program.start(seed)
        with Checkpoints(folder / CHECKPOINTS) as kept:
            done, self.carry = kept.restore(start) or (0, start)
        metrics.rewind(folder / METRICS, done)
        self.history = metrics.load(folder / METRICS)
        self._saved = time.perf_counter()

    @property
    def epoch(self) -> int:
        """Number of epochs made."""
        return len(self.history)

    @property
    def over(self) -> bool:
        """Whether all epochs are made, or a loss was not finite."""
        return self.epoch == self.epochs or bool(self.history and self.history[-1]["diverged"])

    def advance(self, sitting: str) -> None:
        """Trains for an epoch, and evaluates.

        Args:
            sitting: A name of this run of the script: seconds of the same sitting compare.
        """
        spec, begin = self.program.spec, self.epoch * self._each
        numbers = range(begin + 1, begin + self._each + 1)
        length = self.epochs * self._each
        done = self.program.run(
            self._split.train, self.carry, numbers, rate=self._rate, length=length, seed=self._seed
        )
        self.carry = done.carry
        params, constants, _ = done.carry
        on = {"train": self._subset, "test": self._split.test}
        score, loss = {}, {}
        for part, data in on.items():
            score[part], loss[part] = training.evaluate(
                spec.model, params, data, constants, spec.mean
            )
        row = files.without_nan(
            {
                "step": numbers[-1],
                "epoch": self.epoch + 1,
                "train_loss": loss["train"],
                "test_loss": loss["test"],
                score_name(spec): score["test"],
                "seconds": done.seconds,
                "process_seconds": done.process_seconds,
                "diverged": done.diverged or not math.isfinite(loss["train"]),
                "sitting": sitting,
            }
        )
        metrics.append(self.folder / METRICS, [row])
        self.history.append(row)
        if not self.over and time.perf_counter() - self._saved > self._every:
            with Checkpoints(self.folder / CHECKPOINTS) as kept:
                kept.save(numbers[-1], self.carry)
            self._saved = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Fields of the finished training for `results.json`."""
        last = self.history[-1]
        names = ("train_loss", "test_loss", score_name(self.program.spec), "diverged")
        totals = ("seconds", "process_seconds")
        pruned = {}
        if self.program.goal is not None:
            found = flj.sparsity(self.carry.params, self.program.spec.prunable)
            pruned = {"sparsity": found}
        return {
            "steps": last["step"],
            **pruned,
            **{name: last[name] for name in names},
            **{name: sum(row[name] for row in self.history) for name in totals},
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.carry.state)),
            "history": self.history,
        }

    def forget(self) -> None:
        """Deletes the checkpoints, once the result is kept."""
        shutil.rmtree(self.folder / CHECKPOINTS)


def compete(trainings: Sequence[Training], title: str) -> Iterator[Training]:
    """Gives every training its next epoch in turn; one that is behind catches up first.

    Args:
        trainings: The trainings, of as many epochs.
        title: Name of the progress bar.

    Yields:
        Each training once it is over.
    """
    sitting = f"{time.time_ns()}-{os.getpid()}"
    yield from (one for one in trainings if one.over)
    left = [one for one in trainings if not one.over]
    made = sum(one.epoch for one in trainings)
    total = sum(one.epochs for one in trainings)
    with tqdm(desc=title, total=total, initial=made, disable=None) as bar:
        while left:
            level = min(one.epoch for one in left)
            for one in [one for one in left if one.epoch == level]:
                one.advance(sitting)
                bar.set_postfix_str(one.program.name)
                bar.update()
                if one.over:
                    yield one
            left = [one for one in left if not one.over]


def hold(
    runner: Runner,
    common: Mapping[str, Any],
    wanted: Sequence[Mapping[str, Any]],
    begin: Callable[[dict[str, Any]], Training],
    title: str,
) -> list[dict[str, Any]]:
    """Makes the trainings that are not in the file yet, in turn, and keeps each once it is over.

    Args:
        runner: The results of this contest, none so far.
        common: Fields that all trainings have in common.
        wanted: Further fields of each, its `optimizer` among them.
        begin: Function of all fields of a training that returns it; its program has the name of the
            optimiser.
        title: Name of the progress bar.

    Returns:
        The objects of `results.json`, those that were there among them, in the order of `wanted`.
    """
    left = {one["optimizer"]: {**common, **one} for one in runner.missing(common, wanted)}
    for done in compete([begin(one) for one in left.values()], title):
        runner.keep({**left[done.program.name], **done.result()})
        done.forget()
    order = [one["optimizer"] for one in wanted]
    return sorted(runner.rows, key=lambda row: order.index(row["optimizer"]))
