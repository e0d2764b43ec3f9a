"""The table of optimisers, each at its own defaults but for learning rate and weight decay."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

import fishleg_jax as flj
from experiments.models.specs import Spec
from experiments.train import pruning
from experiments.train.pruning import Goal

AUX_EVERY = 5  # steps between batches that curvature is estimated from, the library's default


class Optimizer(NamedTuple):
    """One optimiser.

    Attributes:
        make: A function `(spec, learning_rate, weight_decay) -> transformation`, where the learning
            rate is a function of the step.
        settings: Settings beside these, for `results.json`.
        curvature: Whether it estimates curvature from some of the batches.  `make` has a fourth
            argument then, a `pruning.Goal`, with which it prunes by that estimate.
    """

    make: Callable[..., optax.GradientTransformation]
    settings: Mapping[str, Any] = {}
    curvature: bool = False


def _natural(
    spec: Spec,
    rate: optax.Schedule,
    decay: float,
    goal: Goal | None,
    estimator: flj.InverseFisher | None,
) -> optax.GradientTransformation:
    prune = None if goal is None else pruning.sharing(spec, goal)
    return flj.fishleg_optimizer(
        spec.model,
        rate,
        weight_decay=decay,
        estimator=estimator,
        prune=prune,
        aux_every=AUX_EVERY,
    )


def _fishleg(
    spec: Spec, rate: optax.Schedule, decay: float, goal: Goal | None = None
) -> optax.GradientTransformation:
    return _natural(spec, rate, decay, goal, None)


def _kfac(
    spec: Spec, rate: optax.Schedule, decay: float, goal: Goal | None = None
) -> optax.GradientTransformation:
    return _natural(spec, rate, decay, goal, flj.inverse.kfac(spec.model))


def _adam(spec: Spec, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    del spec, decay
    return optax.adam(rate)


def _adamw(spec: Spec, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    del spec
    return optax.adamw(rate, weight_decay=decay)


def _sgd(spec: Spec, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    del spec
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))


def _matrices(params: Any) -> Any:
    """The axes of kernels, which Muon takes; biases, norms and embeddings are Adam's."""

    def axes(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) != "kernel" or leaf.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(spec: Spec, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    del spec
    return muon(
        rate,
        weight_decay=decay,
        adam_weight_decay=decay,
        muon_weight_dimension_numbers=_matrices,
    )


# SOAP and Shampoo are missing: optax.contrib has neither, nor has any package that is kept up
_CURVATURE = {"aux_every": AUX_EVERY}
OPTIMIZERS = {
    "fishleg": Optimizer(_fishleg, _CURVATURE, curvature=True),
    "kfac": Optimizer(_kfac, _CURVATURE, curvature=True),
    "adam": Optimizer(_adam),
    "adamw": Optimizer(_adamw),
    "sgd": Optimizer(_sgd, {"momentum": 0.9}),
    "muon": Optimizer(_muon),
}


def make(
    spec: Spec, name: str, rate: optax.Schedule, decay: float, goal: Goal | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimiser whose `update` takes `batch=`, whether it needs that or not.

    Args:
        spec: The model.
        name: A name in `OPTIMIZERS`.
        rate: Learning rate as a function of the step.
        decay: Weight decay.
        goal: Sparsity that is reached on the way; None for no pruning.
    """
    one = OPTIMIZERS[name]
    if goal is not None and one.curvature:
        return one.make(spec, rate, decay, goal)
    made = one.make(spec, rate, decay)
    return optax.with_extra_args_support(made if goal is None else pruning.behind(made, spec, goal))


def work(name: str, goal: Goal | None, step: int) -> dict[str, bool]:
    """Further arguments of `update`, chosen on the host; each choice is a compilation of its own.

    Inside a conditional, gradients of convolutions would be many times slower on a CPU.

    Args:
        name: A name in `OPTIMIZERS`.
        goal: As in `make`.
        step: Number of the step, counted from 1.
    """
    one = OPTIMIZERS[name]
    if one.curvature:
        sees = step == 1 or step % AUX_EVERY == 0  # as in the library
        due = goal is not None and goal.due(step)
        return {"assimilate": sees} if sees or due else {"hold": True}
    return {} if goal is None else pruning.work(goal, step)
