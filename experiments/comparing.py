"""What the methods of a comparison have in common, and the settings that tell results apart."""

import argparse
from typing import Any, NamedTuple

import fishleg_jax as flj
from experiments import data, finetuning, methods, results
from experiments.models import Spec

# settings that only those results have for which they were asked for; a training on afterwards
# changes none of the other results
OPTIONAL = ("path", "fresh", "held_out", "augment", "recalibrate", "selection", "border", "fisher")
ITERATIONS = 25  # of a solve, at most


class Job(NamedTuple):
    """What all methods have in common.

    Attributes:
        args: the arguments of `experiments.compare`.
        spec: the model.
        split: the data set.
        part: how the images of the curvature are divided.
        costs: what a weight of each leaf costs; None where that does not count.
    """

    args: argparse.Namespace
    spec: Spec
    split: data.Data
    part: methods.Share
    costs: Any


def _given(method: str, args: argparse.Namespace, part: methods.Share) -> dict[str, Any]:
    """What a user and the data say of the settings of an estimate."""
    return {
        "damping": args.damping.get(method),
        "labels": args.labels,
        "block_size": args.block_size,
        **part.settings,
    }


def make_estimator(
    method: str, args: argparse.Namespace, spec: Spec, part: methods.Share
) -> flj.InverseFisher:
    """The inverse Fisher of a method, for its share of the data."""
    return methods.make_estimator(method, spec.model, **_given(method, args, part))


def examples_of(method: str, job: Job) -> int:
    """How many images a method sees."""
    return 0 if method == "magnitude" else job.part.examples


def settings_of(method: str, job: Job, weights: str) -> dict[str, Any]:
    """All settings that make a difference to the results of a method.

    Args:
        method: the method.
        job: what all methods have in common.
        weights: the fingerprint of the trained weights.
    """
    args, part = job.args, job.part
    informed = method != "magnitude"  # it needs no data, and neither an update nor stages
    updated = informed and args.compensation != "none"
    grouped = updated and args.compensation == "group"
    stages = args.stages if informed else 1
    own = methods.settings_of(method, **_given(method, args, part))
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
        **({"path": sorted(args.sparsity)} if args.path and stages > 1 else {}),
        **(_group_settings(args) if grouped else {}),
        **({"fresh": True} if args.fresh and stages > 1 else {}),
        **({"held_out": args.held_out} if args.held_out and informed else {}),
        **({"augment": True} if args.augment and informed else {}),
        **({"recalibrate": True} if args.recalibrate and stages > 1 else {}),
        **_selection_settings(args, informed),
        **finetuning.settings_of(job.spec, args.finetune, args.finetune_rate),
        "trust": args.trust and informed,
        "batch_size": methods.batch_size(method, part, job.spec.batch) if informed else 0,
        # not the `damping` that a state tells of: FishLeg measures it where none is given
        "damping_given": own.pop("damping", None),
        **own,
    }


def _group_settings(args: argparse.Namespace) -> dict[str, Any]:
    own = {} if args.fisher == "exact" else {"fisher": args.fisher}
    return {
        "solve_damping": args.solve_damping,
        "iterations": args.iterations or ITERATIONS,
        "adapt_damping": not (args.solve_damping or args.fixed_damping) and args.stages > 1,
        **own,
    }


def _selection_settings(args: argparse.Namespace, informed: bool) -> dict[str, Any]:
    if args.selection == "none" or not informed:
        return {}
    return {"selection": args.selection, "border": args.border}


def images_of(method: str, job: Job) -> int:
    """How many images a method sees in all its stages, without the held-out ones."""
    return examples_of(method, job) * _helpings(job.args)


def _helpings(args: argparse.Namespace) -> int:
    # in how many stages images are seen that no other stage sees
    return args.stages if args.fresh else 1


def check_images(args: argparse.Namespace, part: methods.Share, available: int) -> None:
    """Raises a ValueError where more training images are asked for than there are."""
    wanted = part.examples + (args.held_out or 0)
    if wanted > available and args.held_out:
        raise ValueError(
            f"{part.examples} images and {args.held_out} held out are {wanted} images, and the "
            f"training data has {available}"
        )
