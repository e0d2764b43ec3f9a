"""The plan of a gradual pruning: its optimiser, its schedule and the method's transformation."""

import argparse
import hashlib
import json
from typing import Any, NamedTuple

import optax

import fishleg_jax as flj
from experiments.estimates import methods
from experiments.models.specs import Spec
from experiments.models.training import model_in_training
from experiments.running import arguments

DENSE = "dense"  # the same training without pruning
NAMES = ("fishleg", "woodfisher", "mfac", "kfac", "diagonal", "magnitude")
DAMPED = NAMES[:-1]
RENEWED = ("woodfisher", "kfac", "diagonal")  # made anew before each mask update
SALIENCIES = ("auto", "obs", "obd", "mixture", "magnitude")  # the first is the library's default


class Recipe(NamedTuple):
    """How a model is trained while it is pruned, unless a user says otherwise.

    Attributes:
        epochs: how long it is trained before, where there are no trained weights; 0 for random
            weights, so that it is trained and pruned at once.
        optimizer: `adam`, or `sgd` with momentum 0.9 and a weight decay of 1e-4.
        rate: the learning rate.
        decay: whether it falls to zero, like a cosine, once the pruning is over.
        steps: number of steps, during the pruning and after it.
        mask_every: steps between two mask updates.
        aux_every: steps between two batches that the estimate sees.
    """

    epochs: int
    optimizer: str
    rate: float
    decay: bool
    steps: int
    mask_every: int
    aux_every: int


RECIPES = {
    "cnn": Recipe(0, "adam", 1e-3, False, 1200, 50, 10),
    "mlp": Recipe(0, "adam", 1e-3, False, 1200, 50, 10),
    "autoencoder": Recipe(10, "adam", 1e-3, True, 3000, 100, 10),
    "mlpnet": Recipe(10, "adam", 1e-3, False, 3000, 100, 10),
    "faces": Recipe(20, "adam", 1e-3, True, 3000, 100, 10),
    "resnet20": Recipe(30, "sgd", 0.02, True, 1000, 50, 10),
}
# as in `fishleg_jax.fishleg_prune`: how long before the first weight goes curvature is looked at,
# and of how many batches, one a step, FishLeg starts
AHEAD, START = 100, 32
BEGIN, END = 0.1, 0.7  # of all steps: after the first pruning begins, at the second it ends
GRADIENTS = 200


class Plan(NamedTuple):
    """All that makes a difference to a gradual pruning, but for the weights and the seed.

    Attributes:
        method: a name in `NAMES`, or `DENSE`.
        sparsity: the final one.
        recipe: how it is trained.
        batch: examples in a step.
        begin: the step of the first mask update.
        end: the step at which the final sparsity is reached.
        scope: of the threshold.
        compensation: `independent` or `none`.
        saliency: a name in `SALIENCIES`.
        renew: of how many batches before each mask update the estimate is made anew; None for one
            that is carried on.
        estimate: the settings of the estimate and, where it is given, `remat` of the model that
            it looks at, as pairs.
    """

    method: str
    sparsity: float
    recipe: Recipe
    batch: int
    begin: int
    end: int
    scope: str
    compensation: str
    saliency: str
    renew: int | None
    estimate: tuple[tuple[str, Any], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The plan for a `results.json`."""
        own = self._asdict()
        for name in ("method", "sparsity"):  # they are fields of their own
            own.pop(name)
        return {**own.pop("recipe")._asdict(), **own, "estimate": dict(self.estimate)}

    @property
    def name(self) -> str:
        """Sixteen hexadecimal digits that tell it from other plans."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `make_plan` that `arguments.pruning_parser` lacks."""
    add, whole = parser.add_argument, arguments.at_least(1)
    add("--steps", type=arguments.at_least(10), help="of training; default: the model's")
    add("--rate", type=arguments.positive, help="the learning rate; default: the model's")
    add("--mask-every", type=whole, metavar="N", help="steps between mask updates")
    add("--aux-every", type=whole, metavar="N", help="steps between batches that estimates see")
    add(
        "--damping",
        type=arguments.by_name(DAMPED, arguments.positive),
        default={},
        metavar="X|A=X,B=Y",
        help="of all methods, or by name; default: each method's own",
    )
    add(
        "--saliency",
        choices=SALIENCIES,
        default=SALIENCIES[0],
        help="scores of the weights; auto chooses by the loss at every mask update; "
        f"default: {SALIENCIES[0]}",
    )
    add(
        "--gradients",
        type=whole,
        default=GRADIENTS,
        metavar="M",
        help="most gradients, means over equally many examples, that woodfisher makes anew "
        f"before a mask update, and mfac remembers; default: {GRADIENTS}",
    )
    add(
        "--block-size",
        type=arguments.block_size,
        metavar="none|leaf|N",
        help="weights in a block of woodfisher and mfac; default: none, one block of all",
    )


def make_plan(spec: Spec, args: argparse.Namespace, method: str, sparsity: float) -> Plan:
    """The plan of a run.

    Args:
        spec: the model.
        args: of a parser with `add_options`.
        method: a name in `NAMES`, or `DENSE`.
        sparsity: the final one.

    Raises:
        ValueError: there are too few steps.
    """
    recipe = RECIPES[spec.name]
    given = {name: getattr(args, name) for name in ("steps", "rate", "mask_every", "aux_every")}
    recipe = recipe._replace(**{name: value for name, value in given.items() if value})
    every, batch = recipe.mask_every, spec.train_batch
    begin, end = (int(part * recipe.steps / every) * every for part in (BEGIN, END))
    if begin >= end:
        raise ValueError(f"--steps {recipe.steps} is too few for --mask-every {every}")
    seen = max(1, every // recipe.aux_every)  # batches between two mask updates
    estimate = _estimate(method, args, batch, seen)
    if estimate:
        estimate |= arguments.memory_settings(args)
    return Plan(
        method,
        sparsity,
        recipe,
        batch,
        begin,
        end,
        args.scope,
        args.compensation if estimate else "none",
        args.saliency if estimate else "magnitude",
        seen if method in RENEWED else None,
        tuple(sorted(estimate.items())),
    )


def _estimate(method: str, args: argparse.Namespace, batch: int, seen: int) -> dict[str, Any]:
    if method in (DENSE, "magnitude"):
        return {}
    damping = args.damping.get(method)
    if method == "fishleg":
        return {"damping": damping}
    # means over as few examples of a batch as come to no more gradients than wanted
    each = next(
        (n for n in range(1, batch) if batch % n == 0 and seen * batch // n <= args.gradients),
        batch,
    )
    gradients = seen * batch // each
    return methods.settings_of(
        method,
        damping=damping,
        block_size=args.block_size,
        examples_per_gradient=each,
        gradients=gradients,
        window=gradients,
    )


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """The optimiser of a plan, without pruning."""
    recipe = plan.recipe
    rate = recipe.rate
    if recipe.decay:
        rate = optax.join_schedules(
            [
                optax.constant_schedule(recipe.rate),
                optax.cosine_decay_schedule(recipe.rate, recipe.steps - plan.end),
            ],
            [plan.end],
        )
    if recipe.optimizer == "adam":
        return optax.adam(rate)
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def make_pruning(spec: Spec, plan: Plan, seed: int) -> optax.GradientTransformationExtraArgs:
    """The transformation that prunes, which stands last in the chain."""
    if plan.method == DENSE:
        return optax.identity()
    common = {
        "prunable": spec.prunable,
        "scope": plan.scope,
        "aux_every": plan.recipe.aux_every,
        "mask_every": plan.recipe.mask_every,
        "compensation": getattr(flj.compensation, plan.compensation)(),
        "saliency": plan.saliency,
        "training_model": model_in_training(spec),
        "renew": plan.renew,
        "seed": seed,
    }
    schedule = flj.schedules.cubic(plan.sparsity, begin=plan.begin, end=plan.end)
    given = dict(plan.estimate)
    given.pop("remat", None)  # of the model, which `arguments.parse` has made so
    if plan.method == "fishleg":
        return flj.fishleg_prune(spec.model, schedule, **given, **common)
    estimator = methods.make_estimator(plan.method, spec.model, **given)
    return flj.gradual_prune(estimator, schedule, **common)


def assimilates(plan: Plan, step: int) -> bool:
    """Whether the estimate sees the batch of a step, which is counted from one."""
    if plan.method in (DENSE, "magnitude") or step > plan.end:
        return False
    every = plan.recipe.mask_every
    if plan.renew:
        return -step % every < plan.renew and step > plan.begin
    before = plan.begin - AHEAD
    first = max(before, 0) + START
    return step > before and (step <= first or step % plan.recipe.aux_every == 0)


def work_of(plan: Plan, step: int) -> dict[str, bool]:
    """Arguments of `update` at a step, counted from one: chosen on the host.

    Where nothing is due the step only holds what is pruned; and in a conditional gradients of
    convolutions would be thirty times slower.
    """
    if plan.method == DENSE:
        return {}
    due = step % plan.recipe.mask_every == 0 and step <= plan.end
    return told(assimilates(plan, step), due)


def told(assimilate: bool, due: bool) -> dict[str, bool]:
    """Arguments of `update`: a batch to assimilate or not, or only to hold if no mask is due."""
    return {"assimilate": assimilate} if assimilate or due else {"hold": True}
