"""One method of a comparison: prunes a network, and measures all that the comparison shows."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

import fishleg_jax as flj
from experiments import data, finetuning, memory, methods, recalibration, results
from experiments.cases import curvature_batches, stage_batches
from experiments.fitting import FitClock, fit, progress
from experiments.models import Spec


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
        **(_group_settings(args) if grouped else {}),
        **({"fresh": True} if args.fresh and stages > 1 else {}),
        **({"held_out": args.held_out} if args.held_out and informed else {}),
        **({"recalibrate": True} if args.recalibrate and stages > 1 else {}),
        **finetuning.settings_of(job.spec, args.finetune, args.finetune_rate),
        "trust": args.trust and informed,
        "batch_size": methods.batch_size(method, part, job.spec.batch) if informed else 0,
        # not the `damping` that a state tells of: FishLeg measures it where none is given
        "damping_given": own.pop("damping", None),
        **own,
    }


def _group_settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("solve_damping", "iterations", "adapt_damping")
    return {name: getattr(args, name) for name in names}


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


def warm_up(job: Job, dense: results.Dense) -> None:
    """Prunes once for nothing, or what all methods share would be compiled at the cost of one."""
    batches = _batches("magnitude", job, dense, 1, methods.Share(1, 1), seed=0)
    flj.prune_one_shot(
        job.spec.model,
        dense.params,
        flj.inverse.identity(),
        batches,
        sparsity=job.args.sparsity[0],
        scope=job.args.scope,
        compensation=flj.compensation.none(),
        costs=job.costs,
        prunable=job.spec.prunable,
    )


def prune(
    method: str,
    job: Job,
    dense: results.Dense,
    targets: Sequence[float],
    settings: dict[str, Any],
    seed: int,
) -> Iterator[dict]:
    """Prunes a network with one method to some sparsities.

    In a single stage one fit serves all of them, and its seconds (with those of its compilation)
    are in the results of each; in several, each sparsity has fits of its own.  Neither the
    evaluation counts, nor the trust, nor the fine-tuning, which has its own seconds.

    Args:
        method: the method.
        job: what all methods have in common.
        dense: the trained network.
        targets: the sparsities.
        settings: see `settings_of`.
        seed: for the choice of images and for the fit.

    Yields:
        The objects of `results.json`.

    Raises:
        FloatingPointError: the inverse or the pruned weights are not finite.
    """
    batches = _batches(method, job, dense, job.part.examples, job.part, seed)
    per_stage, held_out = len(batches), None
    if settings.get("fresh"):
        batches = stage_batches(
            job.split.train, dense.constants, stages=settings["stages"],
            examples=job.part.examples, batch_size=settings["batch_size"], seed=seed,
            held_out=job.args.held_out or 0,
        )  # fmt: skip
    if "held_out" in settings:
        seen = min(images_of(method, job), len(job.split.train[0]) - job.args.held_out)
        held_out = curvature_batches(
            job.split.train, dense.constants, examples=job.args.held_out,
            batch_size=job.spec.batch, seed=seed, fill=False, beside=seen,
        )  # fmt: skip
    estimator = make_estimator(method, job.args, job.spec, job.part)
    compensation = flj.compensation.none()
    if settings["compensation"] == "independent":
        compensation = flj.compensation.independent(
            scale=settings["scale"],
            first_order=settings["first_order"],
            check_step=settings["first_order"] or "held_out" in settings,
        )
    if settings["compensation"] == "group":
        compensation = flj.compensation.group(
            damping=settings["solve_damping"],
            first_order=settings["first_order"],
            iterations=settings["iterations"],
        )
    anew = recalibration.recalibrate(job.spec) if "recalibrate" in settings else None
    updates = per_stage if estimator.updates is None else estimator.updates
    key, once = jax.random.key(seed), settings["stages"] == 1
    trust = _truster(method, job, dense, seed) if settings["trust"] else lambda result, target: {}

    def trained_on(result: flj.Result) -> dict[str, float]:
        if "finetune" not in settings:
            return {}
        return finetuning.finetuned(
            job.spec, dense, job.split, result,
            epochs=settings["finetune"], rate=settings["finetune_rate"], seed=seed,
        )  # fmt: skip

    def pruned(target: float, state: Any, fit_seconds: float, fit_peak: int | None) -> dict:
        clock = FitClock()
        bar = contextlib.nullcontext() if once else progress(method, clock.on_update)
        begin = time.perf_counter()
        with bar as on_update:
            result = flj.prune_one_shot(
                job.spec.model,
                dense.params,
                estimator,
                batches,
                sparsity=target,
                stages=settings["stages"],
                schedule=job.args.schedule,
                batches_per_stage=per_stage,
                held_out=held_out,
                adapt_damping=settings.get("adapt_damping", False),
                recalibrate=anew,
                scope=settings["scope"],
                compensation=clock.after(compensation),
                first_order=settings["first_order"],
                costs=job.costs,
                prunable=job.spec.prunable,
                key=key,
                state=state,
                on_update=on_update,
            )
        jax.block_until_ready(result.params)
        seconds, highest = time.perf_counter() - begin, peak()
        return results.made(
            result,
            job.spec,
            dense,
            job.split,
            settings={**settings, "updates": updates, **results.measured(result.state)},
            method=method,
            sparsity_target=target,
            seconds=fit_seconds + seconds,
            fit_seconds=fit_seconds + clock.seconds,
            prune_seconds=seconds - clock.seconds,
            peak_memory_bytes=None if highest is None else max(highest, fit_peak),
            curvature_examples=images_of(method, job),
            seed=seed,
            **trust(result, target),
            **trained_on(result),
        )

    with memory.watch() as peak:
        fitted = None, 0.0, 0
        if once:
            begin = time.perf_counter()
            state = fit(estimator, dense.params, batches, key=key, name=method)
            fitted = state, time.perf_counter() - begin, peak()
        for target in tqdm(targets, desc=f"pruning, {method}", disable=None):
            peak()  # forgets the evaluation of the sparsity before
            yield pruned(target, *fitted)


def _batches(
    method: str, job: Job, dense: results.Dense, examples: int, part: methods.Share, seed: int
) -> list[tuple]:
    # of some examples, in batches that suit a part of them
    return curvature_batches(
        job.split.train,
        dense.constants,
        examples=examples,
        batch_size=methods.batch_size(method, part, job.spec.batch),
        seed=seed,
        fill=False,
    )


def _truster(
    method: str, job: Job, dense: results.Dense, seed: int
) -> Callable[[flj.Result, float], dict]:
    """What tells how far two halves of the data agree on a pruning, with fields for its object."""
    half = methods.half(job.part)
    batches = _batches(method, job, dense, 2 * half.examples, half, seed)
    estimator = make_estimator(method, job.args, job.spec, half)

    def trust(result: flj.Result, target: float) -> dict[str, float | None]:
        total = result.report.total
        if total.kept == total.weights:  # there is nothing to agree on
            return dict.fromkeys(flj.Trust._fields)
        return flj.trust(
            job.spec.model,
            dense.params,
            estimator,
            batches,
            sparsity=target,
            scope=job.args.scope,
            prunable=job.spec.prunable,
            key=jax.random.key(seed),
        )._asdict()

    return trust
