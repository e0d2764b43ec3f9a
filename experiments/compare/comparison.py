"""Data and settings shared by the methods of a comparison."""

import argparse
from typing import Any, NamedTuple

import jax

import fishleg_jax as flj
from experiments.data import datasets
from experiments.estimates import methods
from experiments.models import finetuning
from experiments.models.specs import Spec, as_batch
from experiments.running import results

ITERATIONS = 25  # of a solve, at most


class Comparison(NamedTuple):
    """Data and options shared by all methods.

    Attributes:
        args: the arguments of `experiments.compare`.
        spec: the model.
        split: the data set.
        part: the division of the curvature's images among gradients.
        costs: cost of a weight, by leaf; None if costs do not count.
    """

    args: argparse.Namespace
    spec: Spec
    split: datasets.Data
    part: methods.Share
    costs: Any


def make_comparison(args: argparse.Namespace, spec: Spec, split: datasets.Data) -> Comparison:
    """Data and options shared by all methods, see `Comparison`.

    Raises:
        ValueError: too few images for the gradients, or costs that can't be counted.
    """
    part, costs = methods.share(args.examples or spec.examples, args.gradients), None
    if args.costs != "none":
        params, _ = shapes(spec)
        costs = flj.weight_costs(spec.model, params, batch_shapes(spec), unit=args.costs)
    return Comparison(args, spec, split, part, costs)


def shapes(spec: Spec) -> tuple[Any, Any]:
    """The shapes of a model's parameters and constants."""
    return jax.eval_shape(spec.init, jax.random.key(0))


def batch_shapes(spec: Spec) -> tuple:
    """The shapes of a batch of one example without a label."""
    inputs = jax.ShapeDtypeStruct((1, *spec.input_shape), spec.input_dtype)
    return as_batch(inputs, None, shapes(spec)[1])


def _given(method: str, args: argparse.Namespace, part: methods.Share) -> dict[str, Any]:
    """Settings of an estimate that follow from the arguments and the data."""
    return {
        "damping": args.damping.get(method),
        "labels": args.labels,
        "block_size": args.block_size,
        "examples_per_chunk": args.examples_per_chunk,
        **part.settings,
    }


def make_estimator(
    method: str, args: argparse.Namespace, spec: Spec, part: methods.Share
) -> flj.InverseFisher:
    """The inverse Fisher of a method, for its share of the data."""
    return methods.make_estimator(method, spec.model, **_given(method, args, part))


def settings_of(method: str, job: Comparison, weights: str) -> dict[str, Any]:
    """All settings that make a difference to the results of a method.

    Args:
        method: the method.
        job: data and options shared by all methods.
        weights: the fingerprint of the trained weights.
    """
    args, part = job.args, job.part
    informed = _is_informed(method)
    updated = informed and args.compensation != "none"
    grouped = _is_grouped(method, args)
    stages = args.stages if informed else 1
    own = methods.settings_of(method, **_given(method, args, part))
    options = _options(method, args)
    return {
        "weights": weights,
        "prunable": results.prunable(job.spec),
        "scope": args.scope,
        "costs": args.costs,
        "compensation": args.compensation if updated else "none",
        "scale": args.scale if updated and not grouped else None,
        "first_order": args.first_order and informed,
        "stages": stages,
        "schedule": args.schedule if stages > 1 else None,
        **(_group_settings(args) if grouped else {}),
        **{name: value for name, value in options.items() if value is not None},
        **finetuning.settings_of(job.spec, args.finetune, args.finetune_rate),
        "trust": args.trust and informed,
        "batch_size": methods.batch_size(method, part, job.spec.batch) if informed else 0,
        # not the `damping` that a state reports: FishLeg measures it if none is given
        "damping_given": own.pop("damping", None),
        **own,
    }


def wanted_settings(method: str, job: Comparison, weights: str) -> dict[str, Any]:
    """The settings that a stored result must have to be one of these arguments.

    They are those of `settings_of`, and None for each option that was not asked for.  A training
    on afterwards is no such option: it changes none of the other results.
    """
    return _options(method, job.args) | settings_of(method, job, weights)


def _is_informed(method: str) -> bool:
    # magnitude needs no data, and neither an update nor stages
    return method != "magnitude"


def _is_grouped(method: str, args: argparse.Namespace) -> bool:
    return _is_informed(method) and args.compensation == "group"


def _options(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Settings that a result has only if they were asked for, else None."""
    informed = _is_informed(method)
    staged = informed and args.stages > 1
    selecting = informed and args.selection != "none"
    other_fisher = _is_grouped(method, args) and args.fisher != "exact"
    return {
        "path": sorted(args.sparsity) if args.path and staged else None,
        "fresh": True if args.fresh and staged else None,
        "held_out": args.held_out if informed else None,
        "augment": True if args.augment and informed else None,
        "saliency": args.saliency if args.saliency != "obs" and informed else None,
        "recalibrate": True if args.recalibrate and staged else None,
        "selection": args.selection if selecting else None,
        "border": args.border if selecting else None,
        "fisher": args.fisher if other_fisher else None,
        "remat": args.remat if informed else None,
        "examples_per_chunk": args.examples_per_chunk if informed else None,
    }


def _group_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "solve_damping": args.solve_damping,
        "iterations": args.iterations or ITERATIONS,
    }


def images_of(method: str, job: Comparison) -> int:
    """How many images a method sees in all its stages, without the held-out ones."""
    stages_with_their_own = job.args.stages if job.args.fresh else 1
    return job.part.examples * stages_with_their_own if _is_informed(method) else 0
