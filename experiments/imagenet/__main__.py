r"""ResNet-50 on ImageNet, pruned in one shot by FishLeg and its peers from the same few photos.

    python -m experiments.imagenet

Weights are those that `python ../shared/data/prepare.py resnet50` makes, photos those of the two
tars of the shared folder: `calibration.tar` for the curvature, the dampings and batch norm,
`validation.tar` for accuracy and for nothing else.  `--data-dir` takes a full ImageNet instead,
prepared by TensorFlow Datasets as `imagenet2012`.  All 54 kernels are pruned with one threshold,
25,502,912 weights, as WoodFisher's configuration for this network does; `--prunable blocks` leaves
out the first convolution and the classifier, and has 23,445,504.  Biases and batch norm stay.

Every method × compensation × sparsity goes into `results.json` of `--out` as soon as it is there,
with how far every photo's class is from the top, and dampings that were chosen into
`dampings.json`; the same command goes on after it was stopped, and does nothing again.  Prints
tables of top-1 and top-5 with batch norm as stored and recomputed, the paired differences between
FishLeg and its peers at `--tune-at`, and draws `top1_vs_sparsity.png`.

The defaults are for two CPU cores, where a photo takes 0.05 s forwards, 0.2 s for a gradient and
0.26 s for a Fisher product: two hours for everything, one of them for evaluating; woodfisher takes
the most memory, and `--block-size 32` halves that.  `--only`, `--compensation` and `--sparsity`
make it in pieces, to be shown together by the whole command; `JAX_COMPILATION_CACHE_DIR=DIR` keeps
compilations (two minutes of fishleg's) from one piece to the next.  `--photos 325 --sparsity
0.6,0.75` takes less than an hour.  Over night, all photos of the tar:

    --calibration 936 --gradients 36 --updates 600 --solve 128 --iterations 10

It runs in several processes, too, of which each reads the photos of its share, see
`experiments/pods.md`; `--remat` and `--examples-per-chunk` bound the memory of activations.

In stages, each of which sees other photos and leaves its weights in a file, so that it may be
stopped and gone on with; all else by the library's own choices on the held-out photos:

    --stages 8 --sparsity 0.75 --method fishleg --compensation group --solve 64

On a GPU of 80 GB, and there with a full ImageNet:

    --calibration 936 --gradients 104 --block-size 128 --batch 64 --kfac-mean 1 --updates 1200 \
        --solve 936 --iterations 25 --chunk 250
    --data-dir DIR --calibration 16384 --held-out 1024 --photos 50000 --gradients 128 \
        --block-size 128 --batch 64 --kfac-mean 16 --updates 1200 --solve 4096 --iterations 25 \
        --chunk 250
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fishleg_jax as flj
from experiments.imagenet import (
    evaluation,
    in_stages,
    methods,
    one_method,
    photos,
    resnet50,
    tables,
)
from experiments.imagenet.evaluation import Job, Network, Scores
from experiments.report import record
from experiments.running import arguments, processes, results
from experiments.running.runner import Runner
from fishleg_jax import _prunable

SPARSITIES = [0.5, 0.6, 0.7, 0.75, 0.8]
COMPENSATIONS = ["independent", "group"]
PRUNABLE = {"all": None, "blocks": "res.*/kernel"}
Load = Callable[[Path], tuple[Any, Any]]


def make_parser() -> argparse.ArgumentParser:
    """The parser of all arguments."""
    intro, _, more = __doc__.partition("\n\n")
    parser = arguments.command("experiments.imagenet", intro)
    parser.epilog, parser.formatter_class = more, argparse.RawDescriptionHelpFormatter
    add, option = parser.add_argument, partial(arguments.option, parser)
    count = arguments.at_least(1)
    option("--weights", Path, resnet50.folder() / resnet50.FILE)
    add("--data-dir", type=Path, help="where TensorFlow Datasets has imagenet2012; else the tars")
    add(
        "--method",
        "--methods",
        "--only",
        type=arguments.comma_list(arguments.one_of(methods.NAMES)),
        default=list(methods.NAMES),
        metavar="A,B",
        help=f"of {', '.join(methods.NAMES)}; default: all",
    )
    option("--compensation", arguments.one_of(COMPENSATIONS), COMPENSATIONS, several=True)
    option("--sparsity", arguments.sparsity, SPARSITIES, several=True)
    add("--prunable", choices=PRUNABLE, default="all", help="default: all kernels")
    option("--calibration", count, 256, "photos for the curvature")
    option("--held-out", count, 64, "others, to choose dampings")
    add("--photos", type=arguments.at_least(2), help="to evaluate on; default: all")
    option("--gradients", count, 32, "of woodfisher and mfac")
    option("--block-size", count, 64, "of woodfisher")
    option("--kfac-mean", count, 4, "photos in a gradient of kfac")
    option("--updates", arguments.at_least(3), 96, "of fishleg")
    option("--cap", count, 1024, "of fishleg's dense blocks")
    option("--samples", count, 4, "of fishleg's start, of a batch")
    option("--batch", count, 16, "photos of an update or product")
    option("--solve", count, 32, "photos of a group update")
    option("--iterations", count, 4, "of a group update")
    option("--chunk", count, 50, "photos evaluated at once")
    add(
        "--damping",
        type=arguments.by_name(list(methods.NAMES), arguments.positive),
        default={},
        metavar="X|A=X,B=Y",
        help="of estimates, in units of the Fisher of one photo; default: chosen",
    )
    add("--solve-damping", type=arguments.positive, metavar="X", help="of group; default: chosen")
    words = "the sparsity at which dampings are chosen, and methods compared"
    option("--tune-at", arguments.sparsity, 0.75, words)
    add(
        "--stages",
        type=count,
        metavar="N",
        help="stages of each pruning, with other photos each; default: one shot from one fit",
    )
    option("--stage-photos", count, 936, "photos that --stages takes in turn")
    option("--seed", arguments.seed, 0)
    option("--out", Path, Path("results/imagenet"))
    arguments.add_memory_options(parser)
    processes.add_options(parser)
    record.add_option(parser)
    return parser


def _job(args: argparse.Namespace, network: Network, load: Load) -> Job:
    if args.calibration % args.gradients:
        raise ValueError(
            f"--gradients {args.gradients} must divide --calibration {args.calibration}"
        )
    for name in ("solve", "batch", "kfac_mean"):
        if getattr(args, name) > args.calibration:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at most --calibration {args.calibration}")
    if args.batch % args.samples:
        raise ValueError(f"--samples {args.samples} must divide --batch {args.batch}")
    for name in ("calibration", "held_out", "solve", "batch"):
        processes.check_dealt(getattr(args, name), f"--{name.replace('_', '-')}")
    if args.remat:
        network = network._replace(model=flj.remat(network.model, args.remat))
    results.load(args.out / "results.json")
    params, constants = processes.everywhere(load(args.weights))
    source = photos.load(
        args.data_dir,
        calibration=_seen(args) + args.held_out,
        validation=args.photos,
        size=network.size,
    )
    order = np.random.default_rng(args.seed).permutation(len(source.calibration))
    parts = order[: _seen(args)], order[_seen(args) :]
    fit, held_out = map(source.calibration.part, parts)
    prunable = PRUNABLE[args.prunable]
    _prunable.select(params, prunable, "--prunable")
    job = Job(args, network, params, constants, fit, held_out, source.validation, prunable)
    for name in args.method:
        size = methods.make(name, network.model, args, 1.0).batch
        if processes.several() and args.calibration % size:
            raise ValueError(
                f"--calibration {args.calibration} can't be cut into batches of {size}, which "
                f"{name} needs for {jax.device_count()} devices"
            )
    return job


def _seen(args: argparse.Namespace) -> int:
    """Number of photos that the curvature sees, in one stage or in all."""
    return args.calibration if args.stages is None else max(args.stage_photos, args.calibration)


def _identity(job: Job, name: str) -> dict[str, Any]:
    """The fields that identify results of these arguments."""
    args, made = job.args, methods.make(name, job.network.model, job.args, 1.0)
    return {
        "method": name,
        "model": job.network.name,
        "dataset": "imagenet2012" if args.data_dir else "imagenet photos",
        "curvature_examples": args.calibration if name != "magnitude" else 0,
        "seed": args.seed,
        "settings": {
            "weights": results.fingerprint((job.params, job.constants)),
            "prunable": args.prunable,
            "calibration": args.calibration,
            "held_out": args.held_out,
            "tuned_at": args.tune_at,
            "solve": args.solve,
            "iterations": args.iterations,
            "damping_given": args.damping.get(name),
            "solve_damping_given": args.solve_damping,
            **({} if args.stages is None else {"stages": args.stages, "photos": _seen(args)}),
            **arguments.memory_settings(args),
            **made.settings,
        },
    }


def _measured(job: Job, params: Any) -> dict[str, Any]:
    """How good weights are with batch norm as stored and recomputed: fields of a result."""
    stored = evaluation.evaluate(job, params, job.constants)
    again = evaluation.evaluate(job, params, evaluation.recomputed(job, params))
    return _fields(stored, "") | _fields(again, "recalibrated_")


def _counted(job: Job, params: Any) -> dict[str, Any]:
    """Number of prunable weights, and the fraction of them that is zero."""
    chosen = _prunable.select(job.params, job.prunable, "--prunable")
    leaves = [x for x, yes in zip(jax.tree.leaves(params), chosen, strict=True) if yes]
    zeros, weights = sum(int((x == 0).sum()) for x in leaves), sum(x.size for x in leaves)
    return {"sparsity": zeros / weights, "prunable_weights": weights}


def _fields(scores: Scores, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}top1": scores.percent(1),
        f"{prefix}top5": scores.percent(5),
        f"{prefix}loss": scores.loss,
        f"{prefix}ranks": " ".join(map(str, scores.ranks)),  # a line, not one for every photo
    }


def run(job: Job) -> Runner:
    """Prunes to all that the arguments ask for and `results.json` does not have.

    Args:
        job: the network, its photos, and the arguments.

    Returns:
        The results that belong to the arguments, and the failures.
    """
    args, runner = job.args, Runner(job.args.out / "results.json")
    common = {"photos": len(job.validation), "recalibrated_on": args.calibration}

    def evaluate_dense() -> dict[str, Any]:
        fields = _measured(job, job.params)
        print(f"dense: top-1 {fields['top1']:.2f}, top-5 {fields['top5']:.2f}", flush=True)
        return fields

    @cache
    def dense() -> dict[str, Any]:
        identity = _identity(job, "magnitude") | {"method": "dense"}
        row = runner.once(identity | common, evaluate_dense)
        return {f"dense_{k}": row[k] for k in row if k.endswith(("top1", "top5", "loss", "ranks"))}

    start = cache(lambda: evaluation.mean_diagonal(job))
    for name in args.method:
        identity = _identity(job, name)
        wanted = [
            {"compensation": compensation, "sparsity_target": sparsity}
            for compensation in args.compensation
            for sparsity in args.sparsity
        ]
        missing = [
            one_method.Wanted(*one.values()) for one in runner.missing(identity | common, wanted)
        ]
        if not missing:
            continue

        def keep(one, params, fields, identity=identity) -> None:
            row = {
                **identity,
                **common,
                "compensation": one.compensation,
                "sparsity_target": one.sparsity,
                **_counted(job, params),
                **fields,
                **_measured(job, params),
                **dense(),
            }
            runner.keep(row)
            print(tables.line(row), flush=True)

        dense()
        with runner.attempt(name, FloatingPointError, ValueError):
            if args.stages is None:
                one_method.prune(name, job, missing, start, identity, keep)
                continue
            for one in missing:
                in_stages.prune(name, one, job, start, identity, keep)
    return runner


def main(
    argv: Sequence[str] | None = None,
    network: Network = resnet50.NETWORK,
    load: Load = resnet50.load,
) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.
        network: the network.
        load: reads its weights and its statistics of batch norm.

    Returns:
        The exit code.
    """
    parser = make_parser()
    with processes.joined(parser, argv):
        args = parser.parse_args(argv)
        try:
            job = _job(args, network, load)
            args.out.mkdir(parents=True, exist_ok=True)
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"--out {args.out} can't be written: {error.strerror}")
        runner = run(job)
        if runner.rows:
            for what, table in tables.made(runner.rows, args.tune_at).items():
                print(f"{table.title}\n{table}\n")
                name = args.record and f"{args.record}_{what}"
                record.keep(name, table, "experiments.imagenet", argv)
            print(runner.path)
            for picture in tables.draw(args.out, runner.rows):
                print(picture)
    return runner.exit_code()


if __name__ == "__main__":
    sys.exit(main())
