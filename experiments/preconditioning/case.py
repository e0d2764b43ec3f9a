"""A trained network, estimates fitted to its images, and the masks that it is pruned to."""

import argparse
import time
from typing import Any

import jax

import fishleg_jax as flj
from experiments.estimates import methods
from experiments.estimates.fitting import fit
from experiments.models import cases
from experiments.models.specs import MODELS
from experiments.running import results

NONE = "none"  # as a preconditioner


class Network:
    """One network with its images, the estimates fitted to them, and its masks.

    Attributes:
        args: the arguments of `experiments.preconditioning`.
        spec: the model.
        seed: for the training, the choice of images and the fits.
        part: how the images are divided among gradients.
        params: the trained weights.
        weights: their fingerprint.
    """

    def __init__(self, args: argparse.Namespace, name: str, number: int):
        """Loads or trains it."""
        self.args, self.spec, self.seed = args, MODELS[name], number
        self.part = methods.share(args.examples)
        self.params, self._constants, self._train = cases.network(
            name, train_in=args.out, data_dir=args.data_dir, seed=number, epochs=args.epochs
        )
        self.weights = results.fingerprint((self.params, self._constants))
        self._masks, self._scores = {}, None

    def batches(self, size: int) -> list[tuple]:
        """The images in batches."""
        return cases.curvature_batches(
            self._train,
            self._constants,
            examples=self.part.examples,
            batch_size=size,
            seed=self.seed,
            fill=False,
        )

    def given(self, damping: float | None) -> dict[str, Any]:
        """Settings of an estimate that follow from the arguments and the images."""
        return {"damping": damping, "updates": self.args.updates, **self.part.settings}

    def fitted(
        self, method: str, damping: float | None, masks: Any
    ) -> tuple[flj.InverseFisher, Any, float]:
        """An estimate, its state, and the seconds of its fit with those of its compilation."""
        if method == NONE:
            return flj.inverse.identity(), (), 0.0
        estimator = methods.make_estimator(method, self.spec.model, **self.given(damping))
        batches = self.batches(methods.batch_size(method, self.part, self.spec.batch))
        key, begin = jax.random.key(self.seed), time.perf_counter()
        state = fit(estimator, self.params, batches, key=key, name=method, masks=masks)
        return estimator, state, time.perf_counter() - begin

    def masks(self, target: float) -> Any:
        """The mask that all preconditioners have in common."""
        if self._scores is None:
            estimator, state, _ = self.fitted("diagonal", None, None)
            self._scores = flj.obs_saliency(self.params, estimator.diagonal(state, self.params))
        if target not in self._masks:
            self._masks[target] = flj.make_masks(self._scores, target, prunable=self.spec.prunable)
        return self._masks[target]
