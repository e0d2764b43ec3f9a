"""One method of `experiments.imagenet`: fitted once, dampings chosen, pruned to all sparsities."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import fishleg_jax as flj
from experiments.estimates import dampings, fitting
from experiments.estimates.dampings import Choice
from experiments.imagenet import evaluation, methods
from experiments.imagenet.evaluation import Job
from experiments.running import memory, results

FACTOR = 10.0  # between a damping and the next that is tried
TRIES = {"scores": 5, "solve": 3}  # dampings, at most


class Wanted(NamedTuple):
    """A pruning to be made."""

    compensation: str
    sparsity: float


class Estimate:
    """A method's estimate of the inverse Fisher, at one damping after the other.

    Attributes:
        state: the state of the estimator.
        seconds: of the latest fit.
        predicted: bytes that it takes beside weights and photos, from shapes and its compilation.
    """

    def __init__(self, name: str, job: Job, damping: float):
        """Fits it.

        Args:
            name: the method.
            job: data and options shared by all methods.
            damping: the first one, per photo.
        """
        self._name, self._job, self._damping = name, job, damping
        self._how = methods.make(name, job.network.model, job.args, damping)
        self.estimator = self._how.estimator
        self.predicted = None
        self._fit(self.estimator)

    def _fit(self, estimator: flj.InverseFisher) -> None:
        self.state = None  # there may be no room for two
        begin, job = time.perf_counter(), self._job
        size, photos = self._how.batch, len(job.fit)
        whole = job.fit.part(range(photos // size * size or photos))  # all share a compilation
        batches = evaluation.Batches(job, whole, size)
        if self.predicted is None:
            self.predicted = flj.peak_memory(estimator, job.params, batches[0]).peak
            told = f"{self.predicted / 1e9:.1f} GB beside weights and photos"
            print(f"{self._name}: a fit is predicted to take {told}", flush=True)
        key = jax.random.key(job.args.seed)
        self.state = fitting.fit(estimator, job.params, batches, key=key, name=self._name)
        self.seconds = time.perf_counter() - begin

    def move(self, damping: float) -> None:
        """Goes to another damping, which some methods have to be fitted anew for."""
        if damping == self._damping:
            return
        own = damping / self._how.averaged
        moved = dampings.with_damping(self.state, own)
        if moved is None:
            self._fit(dampings.starting_at(self.estimator, own))
        else:
            self.state = moved
        self._damping = damping


def prune(
    name: str,
    job: Job,
    wanted: Sequence[Wanted],
    start: Callable[[], float],
    identity: dict[str, Any],
    keep: Callable[[Wanted, Any, dict], None],
) -> None:
    """Prunes a network with one method to some sparsities, with one compensation after the other.

    Dampings are chosen at the sparsity `--tune-at`, and kept in `dampings.json` of `--out`: that of
    the estimate by pruning with `independent`, and of the solves of `group` by pruning with these.

    Args:
        name: the method.
        job: data and options shared by all methods.
        wanted: the prunings to be made.
        start: gives the damping with which a search begins.
        identity: fields that identify the dampings of these settings.
        keep: called with each pruning as soon as it is made: the request, the pruned weights and
            fields of its result.

    Raises:
        FloatingPointError: no damping gives finite weights.
    """
    args, path = job.args, job.args.out / "dampings.json"
    damped = name != "magnitude"
    with memory.watch() as peak:
        known = _known(path, "scores", identity, args.damping.get(name)) if damped else 1.0
        estimate = Estimate(name, job, start() if known is None else known)
        chosen: dict[str, Choice] = {}

        def pruned(compensation: flj.compensation.Compensation, sparsity: float) -> flj.Result:
            result = flj.prune_one_shot(
                job.network.model,
                job.params,
                estimate.estimator,
                evaluation.solve_batches(job),
                sparsity=sparsity,
                compensation=compensation,
                prunable=job.prunable,
                stages=flj.Stages(state=estimate.state, examples_per_chunk=args.examples_per_chunk),
            )
            return result._replace(state=None)  # the best of a search would keep a second one

        def judged(result: flj.Result) -> tuple[flj.Result, float]:
            return result, evaluation.held_out_loss(job, result.params)

        def search(kind: str, attempt: Callable[[float], tuple]) -> Choice:
            choice = dampings.choose(attempt, start(), factor=FACTOR, most=TRIES[kind])
            tried = {f"{d:.3g}": loss for d, loss in choice.losses.items()}
            print(f"{name}, {kind}: damping {choice.damping:.3g}, of held-out losses {tried}")
            row = {"kind": kind, "damping": choice.damping, "losses": tried}
            results.add(path, [identity | row])
            return choice

        searching = time.perf_counter()
        if known is None:

            def with_scores(damping: float) -> tuple[flj.Result, float]:
                estimate.move(damping)
                return judged(pruned(flj.compensation.independent(), args.tune_at))

            chosen["independent"] = search("scores", with_scores)
            known = chosen["independent"].damping
            estimate.move(known)
        searched = {"independent": time.perf_counter() - searching, "group": 0.0}
        fit_peak = peak()

        solve_damping = None
        if any(one.compensation == "group" for one in wanted):
            searching = time.perf_counter()
            solve_damping = _known(path, "solve", identity, args.solve_damping)
            if solve_damping is None:
                chosen["group"] = search(
                    "solve", lambda d: judged(pruned(_group(job, d), args.tune_at))
                )
                solve_damping = chosen["group"].damping
            searched["group"] = time.perf_counter() - searching
        for one in wanted:
            grouped = one.compensation == "group"
            begin = time.perf_counter()
            known_result = chosen[one.compensation].result if one.compensation in chosen else None
            if known_result is not None and one.sparsity == args.tune_at:
                result = known_result
            else:
                how = _group(job, solve_damping) if grouped else flj.compensation.independent()
                result = jax.block_until_ready(pruned(how, one.sparsity))
            fields = {
                "damping": known if damped else None,
                "solve_damping": solve_damping if grouped else None,
                "fit_seconds": estimate.seconds,
                "search_seconds": searched[one.compensation],
                "prune_seconds": time.perf_counter() - begin,
                "predicted_memory_bytes": estimate.predicted,
                "peak_memory_bytes": _highest(fit_peak, peak()),
                **{f"fit_{k}": v for k, v in results.measured(estimate.state).items()},
            }
            keep(one, result.params, fields)
            peak()  # forgets the evaluation


def _group(job: Job, damping: float) -> flj.compensation.Compensation:
    return flj.compensation.group(damping=damping, iterations=job.args.iterations, check_step=False)


def _known(path: Path, kind: str, identity: dict, given: float | None) -> float | None:
    """A damping that was given, or that an earlier run has chosen; else None."""
    if given is not None:
        return given
    row = results.find(results.load(path), kind=kind, **identity)
    return None if row is None else row["damping"]


def _highest(*peaks: int | None) -> int | None:
    return None if None in peaks else max(peaks)
