"""Batches, constants and curvature of each stage of a one-shot pruning."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from fishleg_jax import _curvature
from fishleg_jax._batch import BatchLike, plain, with_constants
from fishleg_jax._checks import arrays
from fishleg_jax._jit import jitted
from fishleg_jax.model import Model, losses
from fishleg_jax.pruning.one_shot.stages import Stages

PART = 4  # of so many batches one serves to choose between scores


class Data:
    """Batches, constants and curvature of a one-shot pruning."""

    def __init__(
        self,
        model: Model,
        batches: Sequence[BatchLike],
        held_out: Sequence[BatchLike] | None,
        stages: Stages,
        per_stage: int,
    ):
        """Stores the data and how the stages read them.

        Args:
            model: The model.
            batches: Batches for the curvature.
            held_out: Batches to check steps on; None to check on `batches`.
            stages: How the stages run.
            per_stage: Number of batches of each stage.
        """
        self.model, self.examples_per_chunk = model, stages.examples_per_chunk
        self.batches, self.held_out = batches, held_out
        self.recalibrate, self.per_stage = stages.recalibrate, per_stage
        self.curvature_on = partial(
            _curvature.curvature, model, examples_per_chunk=stages.examples_per_chunk
        )
        self._latest: dict[int, Any] = {}  # constants by number of stages done, computed once

    def of_stage(self, stage: int, params: Any) -> tuple[Sequence[BatchLike], _curvature.Curvature]:
        """Batches of a stage with constants for the weights at hand, and their curvature."""
        constants = self.constants_after(stage, params) if stage > 0 else None
        own = with_constants(self._seen_in(stage), constants)
        curvature = self.curvature_on(own)
        if self.held_out is not None:
            measured_on = with_constants(self.held_out, constants)
            checks = {
                "check": self.curvature_on(measured_on).loss,
                "each": partial(_losses_of, self.model, self.examples_per_chunk, measured_on),
            }
            part = self.curvature_on(own[::PART])._replace(**checks)
            curvature = curvature._replace(part=part, **checks)
        return own, curvature

    def constants_after(self, stages: int, params: Any) -> Any | None:
        """Constants for the weights after a number of stages; None without `recalibrate`."""
        if stages not in self._latest:
            self._latest.clear()
            self._latest[stages] = self._constants(params, self._seen_in(max(stages - 1, 0)))
        return self._latest[stages]

    def loss(self, params: Any) -> jax.Array:
        """Loss of weights on the held-out batches if there are any, else on all batches."""
        measured_on = self.batches if self.held_out is None else self.held_out
        own = with_constants(measured_on, self._constants(params, self.batches))
        return self.curvature_on(own).loss(params)

    def _seen_in(self, stage: int) -> list[BatchLike]:
        first, number = stage * self.per_stage, len(self.batches)
        return [self.batches[(first + i) % number] for i in range(self.per_stage)]

    def _constants(self, params: Any, batches: Sequence[BatchLike]) -> Any | None:
        if self.recalibrate is None:
            return None
        constants = self.recalibrate(params, batches)
        arrays.check_constants(constants, batches[0])
        return constants


def _losses_of(
    model: Model, chunk: int | None, batches: Sequence[BatchLike], params: Any
) -> list[jax.Array]:
    """Losses of all examples, batch by batch, as examples may be sharded over devices."""
    return [jitted(_losses, model, chunk)(params, plain(batch)) for batch in batches]


def _losses(model: Model, chunk: int | None, params: Any, batch: BatchLike) -> jax.Array:
    return losses(model, params, batch, examples_per_chunk=chunk)
