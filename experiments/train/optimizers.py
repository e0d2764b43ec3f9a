"""The table of optimisers, each at its own defaults but for learning rate and weight decay."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

import fishleg_jax as flj
from experiments.models.specs import Spec

AUX_EVERY = 5  # steps between batches that curvature is estimated from, the library's default
Rate = optax.Schedule
Make = Callable[[Spec, Rate, float], optax.GradientTransformation]


def _no_work(step: int) -> dict[str, bool]:
    del step
    return {}


class Optimizer(NamedTuple):
    """One optimiser.

    Attributes:
        make: A function `(spec, learning_rate, weight_decay) -> transformation`, where the learning
            rate is a function of the step.
        settings: Settings beside these, for `results.json`.
        work: A function of the step, counted from 1, that returns further arguments of `update`;
            they are chosen on the host, and each choice is a compilation of its own.
    """

    make: Make
    settings: Mapping[str, Any] = {}
    work: Callable[[int], dict[str, bool]] = _no_work


def _curvature(step: int) -> dict[str, bool]:
    """Whether curvature sees the batch of a step: as in the library, but without a conditional."""
    return {"assimilate": step == 1 or step % AUX_EVERY == 0}


def _fishleg(spec: Spec, rate: Rate, decay: float) -> optax.GradientTransformation:
    return flj.fishleg_optimizer(
        spec.model, rate, weight_decay=decay, aux_every=AUX_EVERY, damping="adaptive"
    )


def _kfac(spec: Spec, rate: Rate, decay: float) -> optax.GradientTransformation:
    estimator = flj.inverse.kfac(spec.model)
    return optax.chain(
        flj.scale_by_inverse_fisher(estimator, aux_every=AUX_EVERY, damping="adaptive"),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


def _adam(spec: Spec, rate: Rate, decay: float) -> optax.GradientTransformation:
    del spec, decay
    return optax.adam(rate)


def _adamw(spec: Spec, rate: Rate, decay: float) -> optax.GradientTransformation:
    del spec
    return optax.adamw(rate, weight_decay=decay)


def _sgd(spec: Spec, rate: Rate, decay: float) -> optax.GradientTransformation:
    del spec
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


def _matrices(params: Any) -> Any:
    """The axes of kernels, which Muon takes; biases, norms and embeddings are Adam's."""

    def axes(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) != "kernel" or leaf.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(spec: Spec, rate: Rate, decay: float) -> optax.GradientTransformation:
    del spec
    return muon(
        rate,
        weight_decay=decay,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=_matrices,
    )


# SOAP and Shampoo are missing: optax.contrib has neither, nor has any package that is kept up
OPTIMIZERS = {
    "fishleg": Optimizer(_fishleg, {"aux_every": AUX_EVERY, "damping": "adaptive"}, _curvature),
    "kfac": Optimizer(_kfac, {"aux_every": AUX_EVERY, "damping": "adaptive"}, _curvature),
    "adam": Optimizer(_adam),
    "adamw": Optimizer(_adamw),
    "sgd": Optimizer(_sgd, {"momentum": 0.9}),
    "muon": Optimizer(_muon),
}


def make(spec: Spec, name: str, rate: Rate, decay: float) -> optax.GradientTransformationExtraArgs:
    """Makes an optimiser whose `update` takes `batch=`, whether it needs that or not.

    Args:
        spec: The model.
        name: A name in `OPTIMIZERS`.
        rate: Learning rate as a function of the step.
        decay: Weight decay.
    """
    return optax.with_extra_args_support(OPTIMIZERS[name].make(spec, rate, decay))
