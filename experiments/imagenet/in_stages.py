"""Pruning of `experiments.imagenet` in stages, which may be stopped between any two of them.

Every stage sees other photos for the curvature, as many as `--calibration` says, and leaves its
weights in a file below `stages/` of `--out`; the same command goes on after the last whole stage.
Batch norm keeps the statistics as stored.  In one run an estimate that can is carried on from stage
to stage, in a quarter of a fit; after a stop it is fitted anew, so that a run that was stopped ends
at slightly other weights than one that was not.  Damping, step and length of the solves of `group`
are chosen by the loss of the held-out photos.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.estimates import fitting
from experiments.imagenet import evaluation, methods
from experiments.imagenet.evaluation import Job
from experiments.imagenet.one_method import Wanted
from experiments.running import files, processes
from fishleg_jax.pruning.masks.files import read_npz

RELATIVE_DAMPING = 0.1  # over the mean of the Fisher's diagonal
NUMBERS = ("sparsity", "predicted", "actual", "held_out", "damping", "step", "iterations")


def prune(
    name: str,
    wanted: Wanted,
    job: Job,
    start: Callable[[], float],
    identity: dict[str, Any],
    keep: Callable[[Wanted, Any, dict], None],
) -> None:
    """Prunes a network to a sparsity in `--stages` stages.

    Args:
        name: the method.
        wanted: compensation, and the sparsity to end at.
        job: data and options shared by all methods; its photos for the curvature are those of all
            stages, which take them in turn.
        start: gives the mean of the Fisher's diagonal; unless a damping is given, it is a tenth of
            that.
        identity: fields that identify the pruning.
        keep: called at the end with the request, the pruned weights and fields of the result.

    Raises:
        FloatingPointError: weights that are not finite.
        ValueError: a file with other weights.
    """
    compensation, sparsity = wanted
    folder = _folder(job.args.out, identity, wanted)
    damping = job.args.damping.get(name)
    if damping is None:
        damping = RELATIVE_DAMPING * start()
    number = job.args.stages
    sparsities = flj.stage_sparsities(sparsity, number)
    paths = [folder / f"stage{i + 1}of{number}.npz" for i in range(number)]
    done = next((i for i, path in enumerate(paths) if not processes.agreed(path.exists())), number)
    params, rows = job.params, []
    if done:
        params, rows = read(paths[done - 1], params)
        print(f"{name}: going on after stage {done} of {number}", flush=True)
    made = methods.make(name, job.network.model, job.args, damping)
    state = None
    for stage in range(done, number):
        begin = time.perf_counter()
        result, fit = _one_stage(
            made, name, compensation, sparsities[stage], job, params, state, stage
        )
        params, state = result.params, result.state
        numbers = result.report.to_dict()["stages"][0]
        row = {key: numbers[key] for key in NUMBERS if key in numbers}
        rows.append(row | {"fit_seconds": fit, "seconds": time.perf_counter() - begin})
        write(paths[stage], params, rows)
        numbers_of_stage = ", ".join(f"{key} {value:.3g}" for key, value in rows[-1].items())
        print(f"{name}: stage {stage + 1} of {number}, {numbers_of_stage}", flush=True)
    fields = {
        "damping": damping if name != "magnitude" else None,
        "solve_damping": rows[-1].get("damping"),
        "fit_seconds": sum(row["fit_seconds"] for row in rows),
        "search_seconds": 0.0,
        "prune_seconds": sum(row["seconds"] - row["fit_seconds"] for row in rows),
        "predicted_memory_bytes": None,
        "peak_memory_bytes": None,
        "stage_numbers": rows,
    }
    keep(wanted, params, fields)


def _one_stage(
    made: methods.Fit,
    name: str,
    compensation: str,
    sparsity: float,
    job: Job,
    params: Any,
    state: Any,
    stage: int,
) -> tuple[flj.Result, float]:
    """Fits to the stage's photos, or carries on, and prunes further; the seconds of the fit."""
    args, estimator = job.args, made.estimator
    size = min(args.calibration, len(job.fit))
    photos = job.fit.part([(stage * size + i) % len(job.fit) for i in range(size)])
    batches = evaluation.Batches(job, photos, made.batch)
    masks = jax.tree.map(lambda p: p != 0, params) if stage else None
    carried = {} if state is None or estimator.carry is None else {"state": state}
    key = jax.random.fold_in(jax.random.key(args.seed), stage)
    begin = time.perf_counter()
    state = fitting.fit(estimator, params, batches, key=key, name=name, masks=masks, **carried)
    seconds = time.perf_counter() - begin
    solve = photos.part(range(min(args.solve, size)))
    if compensation == "group":
        how = flj.compensation.group(iterations=args.iterations, attempts=2)
    else:
        how = flj.compensation.independent()
    result = flj.prune_one_shot(
        job.network.model,
        params,
        estimator,
        evaluation.Batches(job, solve, args.batch),
        held_out=evaluation.Batches(job, job.held_out, args.batch),
        sparsity=sparsity,
        compensation=how,
        prunable=job.prunable,
        stages=flj.Stages(state=state, examples_per_chunk=args.examples_per_chunk),
        key=key,
    )
    return result, seconds


def write(path: Path, params: Any, rows: list[dict]) -> None:
    """Writes weights and the numbers of all stages so far, whole or not at all."""
    arrays = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))}
    files.write(path, lambda beside: np.savez(beside, stages=json.dumps(rows), **arrays))
    processes.wait(str(path))


def read(path: Path, like: Any) -> tuple[Any, list[dict]]:
    """Weights that `write` wrote, placed like others, and the numbers of their stages.

    Raises:
        ValueError: the file is broken, or of another network.
    """
    entries, (leaves, tree) = read_npz(path), jax.tree.flatten(like)
    found = [entries.get(f"leaf{i}") for i in range(len(leaves))]
    same = [getattr(x, "shape", None) for x in found] == [x.shape for x in leaves]
    if not same or len(entries) != len(leaves) + 1:
        raise ValueError(
            f"{path} has the weights of another network: delete it, or name another --out"
        )
    placed = [
        jax.device_put(jnp.asarray(x), y.sharding) for x, y in zip(found, leaves, strict=True)
    ]
    return tree.unflatten(placed), json.loads(str(entries["stages"]))


def _folder(out: Path, identity: dict[str, Any], wanted: Wanted) -> Path:
    """A folder for the stages of one pruning, named after what identifies it."""
    identifying = repr((sorted(identity.items(), key=str), wanted))
    digest = hashlib.sha256(identifying.encode()).hexdigest()[:12]
    return out / "stages" / f"{identity['method']}_{wanted.sparsity:g}_{digest}"
