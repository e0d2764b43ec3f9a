"""One method of a comparison: prunes a network, and measures all that the comparison shows."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

import fishleg_jax as flj
from experiments.compare import choices
from experiments.compare.choices import through
from experiments.compare.comparison import Comparison, images_of, make_estimator
from experiments.estimates import methods
from experiments.estimates.fitting import FitClock, fit, progress
from experiments.models import finetuning, recalibration
from experiments.models.cases import augmented, curvature_batches, stage_batches
from experiments.running import memory, results


def warm_up(job: Comparison, dense: results.Dense) -> None:
    """Prunes once for nothing, so that no method pays for the compilation of shared functions."""
    batches = _batches("magnitude", job, dense, 1, methods.Share(1, 1), seed=0)
    flj.prune_one_shot(
        job.spec.model,
        dense.params,
        flj.inverse.identity(),
        batches,
        sparsity=0.5,
        scope=job.args.scope,
        compensation=flj.compensation.none(),
        prunable=flj.Leaves(job.spec.prunable, costs=job.costs),
    )


def prune(
    method: str,
    job: Comparison,
    dense: results.Dense,
    targets: Sequence[float],
    settings: dict[str, Any],
    seed: int,
    keep: Callable[[dict], None],
) -> None:
    """Prunes a network with one method to some sparsities.

    In a single stage one fit serves all of them, and its seconds (with those of its compilation)
    are in the results of each; in several, each sparsity has stages and fits of its own, or with
    `--path` all lie on one path, with the seconds until there.  Neither the evaluation counts, nor
    the trust, nor the fine-tuning, which has its own seconds.

    Args:
        method: the method.
        job: data and options shared by all methods.
        dense: the trained network.
        targets: the sparsities.
        settings: see `settings_of`.
        seed: for the choice of images and for the fit.
        keep: called with each object of `results.json` as soon as it is there.

    Raises:
        FloatingPointError: the inverse or the pruned weights are not finite, or in a later stage,
            so that a sparsity was not reached; then there is no result of it.
    """
    spec, args = job.spec, job.args
    missed = []
    if settings.get("fresh"):
        batches = stage_batches(
            job.split.train,
            dense.constants,
            stages=settings["stages"],
            examples=job.part.examples,
            batch_size=settings["batch_size"],
            seed=seed,
            held_out=args.held_out or 0,
        )
        per_stage = len(batches) // settings["stages"]
    else:
        batches = _batches(method, job, dense, job.part.examples, job.part, seed)
        per_stage = len(batches)
    if settings.get("augment"):
        batches = augmented(spec.dataset, batches, seed)
    estimator = make_estimator(method, args, spec, job.part)
    updates = per_stage if estimator.updates is None else estimator.updates
    key, once = jax.random.key(seed), settings["stages"] == 1
    trust = _truster(method, job, dense, seed) if settings["trust"] else lambda result, target: {}
    path = through(settings["path"], settings["stages"]) if "path" in settings else None
    stages = flj.Stages(
        settings["stages"],
        schedule=args.schedule if path is None else path,
        batches_per_stage=per_stage,
        recalibrate=recalibration.recalibrate(spec) if "recalibrate" in settings else None,
        examples_per_chunk=args.examples_per_chunk,
    )
    options = {
        "held_out": _held_out(method, job, dense, settings, seed),
        "selection": choices.selection(settings, seed),
        "scope": settings["scope"],
        "saliency": settings.get("saliency", "obs"),
        "prunable": flj.Leaves(spec.prunable, costs=job.costs),
        "key": key,
    }

    def trained_on(result: flj.Result) -> dict[str, float]:
        if "finetune" not in settings:
            return {}
        return finetuning.finetuned(
            spec,
            dense,
            job.split,
            result,
            epochs=settings["finetune"],
            rate=settings["finetune_rate"],
            seed=seed,
        )

    def keep_result(result: flj.Result, target: float, seconds: float, fit_seconds: float) -> None:
        highest = peak()
        keep(
            results.made(
                result,
                spec,
                dense,
                job.split,
                settings={**settings, "updates": updates, **results.measured(result.state)},
                method=method,
                sparsity_target=target,
                seconds=seconds,
                fit_seconds=fit_seconds,
                prune_seconds=seconds - fit_seconds,
                peak_memory_bytes=None if highest is None else max(highest, fit_peak),
                predicted_memory_bytes=predicted,
                curvature_examples=images_of(method, job),
                seed=seed,
                **({"stopped": result.stopped} if result.stopped else {}),
                **({} if once else _of_stages(result, job)),
                **trust(result, target),
                **trained_on(result),
            )
        )
        peak()  # forgets the evaluation

    def pruned(target: float | str) -> None:
        """Prunes, and keeps the result, or the results of some stages on a path."""
        clock = FitClock()
        begin, aside = time.perf_counter(), 0.0

        def on_stage(result: flj.Result) -> None:
            if not once:
                tqdm.write(_line(method, result.stages), file=sys.stderr)
            if path is not None and result.stages[-1]["sparsity"] in targets:
                finished(result, result.stages[-1]["sparsity"])

        def finished(result: flj.Result, came_to: float | str) -> None:
            nonlocal aside
            jax.block_until_ready(result.params)
            stop = time.perf_counter()
            seconds = fitted_in + stop - begin - aside
            keep_result(result, came_to, seconds, fitted_in + clock.seconds)
            aside += time.perf_counter() - stop
            clock.restart()

        bar = contextlib.nullcontext() if once else progress(method, clock.on_update)
        goal = choices.goal(target, spec, options["held_out"] or batches)
        with bar as on_update:
            result = flj.prune_one_shot(
                spec.model,
                dense.params,
                estimator,
                batches,
                sparsity=goal,
                compensation=clock.after(choices.compensation(settings)),
                stages=stages._replace(state=state, on_update=on_update, on_stage=on_stage),
                **options,
            )
        ended = None if isinstance(target, str) else result.stopped  # a target tells how it ended
        if ended:
            missed.append(f"{100 * target:g} %: {ended}")
        elif path is None:
            finished(result, target)

    with memory.watch() as peak:
        state, fitted_in, fit_peak = None, 0.0, 0
        begin = time.perf_counter()
        predicted = flj.peak_memory(estimator, dense.params, batches[0]).peak
        if once:
            peak()  # forgets the compiler
            state = fit(estimator, dense.params, batches, key=key, name=method)
            fitted_in, fit_peak = time.perf_counter() - begin, peak()
            if predicted:
                tqdm.write(memory.told(method, predicted, fit_peak))
        ends = targets if path is None else path[-1:]
        for target in tqdm(ends, desc=f"pruning, {method}", disable=None):
            pruned(target)
    if missed:
        raise FloatingPointError("; ".join(missed))


def _held_out(
    method: str, job: Comparison, dense: results.Dense, settings: dict[str, Any], seed: int
) -> list[tuple] | None:
    if "held_out" not in settings:
        return None
    seen = min(images_of(method, job), len(job.split.train[0]) - job.args.held_out)
    batches = curvature_batches(
        job.split.train,
        dense.constants,
        examples=job.args.held_out,
        batch_size=job.spec.batch,
        seed=seed,
        fill=False,
        beside=seen,
    )
    return augmented(job.spec.dataset, batches, seed + 1) if settings.get("augment") else batches


def _line(method: str, stages: Sequence[dict[str, Any]]) -> str:
    """The last stage in a line, for those who wait."""
    told = {name: value for name, value in stages[-1].items() if isinstance(value, float)}
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
    return f"{method}, stage {len(stages)}: {numbers}"


def _of_stages(result: flj.Result, job: Comparison) -> dict[str, Any]:
    """The reports of the stages as far as a file can hold them, and the number of images seen."""
    plain = (int, float, type(None))
    told = [
        {name: value for name, value in stage.items() if isinstance(value, plain)}
        for stage in result.stages
    ]
    helpings = len(told) if job.args.fresh else 1
    return {"stages": told, "images_seen": helpings * job.part.examples}


def _batches(
    method: str,
    job: Comparison,
    dense: results.Dense,
    examples: int,
    part: methods.Share,
    seed: int,
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
    method: str, job: Comparison, dense: results.Dense, seed: int
) -> Callable[[flj.Result, float], dict]:
    """Makes the function that measures how far two halves of the data agree on a pruning."""
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
            examples_per_chunk=job.args.examples_per_chunk,
        )._asdict()

    return trust
