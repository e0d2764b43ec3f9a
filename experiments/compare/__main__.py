"""Compares all methods on one network, with the same data for the curvature of each.

    python -m experiments.compare
    python -m experiments.compare --model mlpnet --checkpoint mlpnet_mnist.npz --seed 0,1,2

Every method × sparsity × seed goes into `results.json` of `--out`, in the objects that
`experiments.one_shot` writes, with four fields more: `fit_seconds`, `prune_seconds`,
`peak_memory_bytes`, see `experiments.running.memory`, and `predicted_memory_bytes`, what the fit
was expected to take.  With `--finetune` each pruned network is trained on with its masks held, for
`finetuned_accuracy`, `finetuned_loss` and `finetune_seconds`.  Prints tables of accuracy and loss
with the median and the range over seeds, and draws `accuracy_vs_sparsity.png`.  The same command
goes on after it was stopped; see `--help`.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from experiments.compare import comparison, one_method, options
from experiments.compare.comparison import Comparison
from experiments.data import datasets
from experiments.models import training
from experiments.models.specs import Spec
from experiments.report import plots, record, tables
from experiments.running import arguments, processes, results
from experiments.running.runner import Runner


def _weights(job: Comparison, loaded: Any, seed: int) -> tuple[Any, Any]:
    """The parameters and constants: those of the checkpoint, or trained and kept in `--out`."""
    if loaded is not None:
        return loaded
    args, spec = job.args, job.spec
    path = args.out / f"{spec.name}_{args.epochs or spec.epochs}epochs_seed{seed}.npz"
    if not path.exists():
        print(path)
    return training.trained(spec, job.split.train, path, epochs=args.epochs, seed=seed)


def run(args: argparse.Namespace, spec: Spec, split: datasets.Data, loaded: Any) -> Runner:
    """All methods, sparsities and seeds, without those that `results.json` has already.

    Args:
        args: the arguments.
        spec: the model.
        split: the data set.
        loaded: trained parameters and constants; None to train.

    Returns:
        The results that belong to the arguments, and the failures.
    """
    job = comparison.make_comparison(args, spec, split)
    runner, cold = Runner(args.out / "results.json"), True
    for seed in args.seed:
        params, constants = processes.everywhere(_weights(job, loaded, seed))
        weights, dense = results.fingerprint((params, constants)), None
        for method in args.method:
            settings = comparison.settings_of(method, job, weights)
            identity = {
                "method": method,
                "dataset": spec.dataset,
                "model": spec.name,
                "curvature_examples": comparison.images_of(method, job),
                "seed": seed,
                "settings": comparison.wanted_settings(method, job, weights),
            }
            wanted = [{"sparsity_target": target} for target in args.sparsity]
            missing = [one["sparsity_target"] for one in runner.missing(identity, wanted)]
            if len(missing) < len(wanted):
                known = f"{len(wanted) - len(missing)} of {len(wanted)} sparsities"
                print(f"seed {seed}, {method}: {known} are in {runner.path} already")
            if not missing:
                continue
            dense = dense or results.evaluated(spec, split, params, constants)
            if cold:
                one_method.warm_up(job, dense)
                cold = False
            with runner.attempt(f"seed {seed}, {method}", FloatingPointError):
                one_method.prune(method, job, dense, missing, settings, seed, runner.keep)
    return runner


def show(rows: Sequence[dict], finetuned: bool = False) -> str:
    """Tables of accuracy and loss, and of trust where it was measured.

    Seconds are medians over sparsities and seeds, the peak of memory is the highest.

    Args:
        rows: the objects of a `results.json`.
        finetuned: whether they were trained on, for tables of that.
    """

    def column(field, unit, digits, of=statistics.median):
        def cell(own):
            values = [row[field] for row in own if row.get(field) is not None]
            return f"{of(values) / unit:.{digits}f}" if values else "–"

        return cell

    further = {
        "fit, s": column("fit_seconds", 1, 1),
        "prune, s": column("prune_seconds", 1, 1),
        "predicted, MB": column("predicted_memory_bytes", 1e6, 0, max),
        "peak, MB": column("peak_memory_bytes", 1e6, 0, max),
    }
    shown = []
    for prefix, title in tables.measurements(rows).items():
        shown += _accuracy_and_loss(rows, prefix, title, {} if prefix else further)
    if any(isinstance(row["sparsity_target"], str) for row in rows):
        reached = [row | {"percent": 100 * row["sparsity"]} for row in rows]
        shown.insert(0, tables.by_sparsity(reached, "percent", "sparsity, %", tables.spread))
        ends = [row for row in rows if row.get("stopped")]
        shown += [
            f"seed {row['seed']}, {row['method']}, {row['sparsity_target']}: {row['stopped']}"
            for row in ends
        ]
    asked = [row for row in rows if "agreement" in row]
    if asked:
        shown += [
            tables.by_sparsity(asked, "agreement", "agreement of halves", tables.spread),
            tables.by_sparsity(asked, "inflation", "inflation, other half", tables.spread),
        ]
    if finetuned:
        after = {"fine-tuning, s": column("finetune_seconds", 1, 1)}
        shown += [
            tables.by_sparsity(rows, "finetuned_accuracy", "fine-tuned, %", tables.spread, after),
            tables.by_sparsity(
                rows, "finetuned_loss", "fine-tuned, nats", lambda values: tables.spread(values, 3)
            ),
        ]
    return "\n\n".join(shown)


def _accuracy_and_loss(rows: Sequence[dict], prefix: str, title: str, further: dict) -> list[str]:
    accuracy, loss = f"{prefix}accuracy", f"{prefix}loss"
    return [
        tables.by_sparsity(rows, accuracy, f"{title}test accuracy, %", tables.spread, further),
        tables.by_sparsity(
            rows, loss, f"{title}test loss, nats", lambda values: tables.spread(values, 3)
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = options.make_parser()
    with processes.joined(parser, argv):
        args, spec, split, loaded = arguments.parse(parser, argv, options.check)
        runner = run(args, spec, split, loaded)
        rows, path = runner.rows, runner.path
        if rows and processes.is_first():
            print(show(rows, finetuned=args.finetune is not None))
            others = len(results.load(path)) - len(rows)
            print(f"{path} ({others} results of other settings too)" if others else path)
            print(plots.accuracy_vs_sparsity(args.out / "accuracy_vs_sparsity.png", rows))
            test = len(split.test[0])
            record.keep_accuracies(args.record, rows, "experiments.compare", argv, test)
        return runner.exit_code()


if __name__ == "__main__":
    sys.exit(main())
