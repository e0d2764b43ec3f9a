"""Measures what a pruned network pays: bytes on disk and milliseconds, path by path.

    python -m experiments.deploy
    python -m experiments.deploy --network digits --method fishleg

A network is pruned in one shot, written and run in every way of `experiments.deploy.paths`, and
all ways are timed in turn, so that their ratios are of one run.  Beside it stands the dense network
without the units of the smallest weights, half of its operations, by `flj.compact`, not trained.
Batch norm is recomputed on training images after pruning.  Magnitude, the default, prunes in no
time; bytes and milliseconds are those of any method.  Times are those from inputs to outputs of
NumPy.  Prints a table and writes `results.json`, `accuracy_vs_ms.png` and the files themselves
into `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.deploy import measuring, paths, plots, subjects
from experiments.models import cases
from experiments.report import record, tables
from experiments.running import arguments, files

COLUMNS = {
    "network, path": "{network}: {path}",
    "accuracy, %": "{accuracy:.2f}",
    "bytes": "{bytes:,}",
    "over dense": "{bytes_ratio:.3f}",
    "ms, batch 1": "{ms_1:.3f}",
    "ratio": "{ratio_1:.2f}",
    "ms, batch 128": "{ms_128:.2f}",
    "ratio ": "{ratio_128:.2f}",
    "": "{note_128}",
}


def _parser() -> argparse.ArgumentParser:
    parser = arguments.command(
        "experiments.deploy", "Measure bytes and milliseconds of pruned networks, path by path."
    )
    names = list(subjects.NETWORKS)
    add, option = parser.add_argument, arguments.option
    one = arguments.one_of(names)
    option(parser, "--network", one, names, f"of {', '.join(names)}", several=True)
    add("--method", choices=subjects.METHODS, default="magnitude", help="default: magnitude")
    option(parser, "--sparsity", arguments.sparsity, 0.9)
    option(parser, "--examples", arguments.at_least(1), 2000, "test images, at most")
    option(parser, "--seconds", arguments.positive, 10.0, "of the timing, for each batch size")
    option(parser, "--seed", arguments.seed, 0)
    out = Path("results/deploy")
    add("--out", type=Path, default=out, help=f"default: {out}")
    record.add_option(parser)
    return parser


def table(rows: Sequence[dict], args: argparse.Namespace) -> record.Table:
    """A row for each network and path.

    Args:
        rows: objects of `results.json`.
        args: the arguments.
    """
    fields = {
        "accuracy, %": ("accuracy", 2),
        "bytes": ("bytes", 0),
        "over dense": ("bytes_ratio", 3),
        "ms, batch 1": ("ms_1", 3),
        "ratio, batch 1": ("ratio_1", 2),
        "ms, batch 128": ("ms_128", 2),
        "ratio, batch 128": ("ratio_128", 2),
    }
    cells: list[list[record.Cell]] = [
        [f"{row['network']}: {row['path']}", *(row[field] for field, _ in fields.values())]
        for row in rows
    ]
    return record.Table(
        title=f"After pruning to {args.sparsity:.0%} by {args.method}, path by path",
        columns=["", *fields],
        rows=cells,
        decimals=[0, *(digits for _, digits in fields.values())],
        seed=str(args.seed),
        data=", ".join(dict.fromkeys(row["network"] for row in rows)),
        examples=f"at most {args.examples:,} test examples",
        note="Ratios of times to the dense network's are medians over rounds in which all paths "
        f"were timed in turn.{_made_sparse(rows)}",
    )


def _made_sparse(rows: Sequence[dict]) -> str:
    """Sentence with the kernels that became sparse, for each network and batch size.

    The row with BCSR is faster even if there are none: its weights are constants of the program.
    """
    found = [
        f"{row['network']} at batch {batch}, {row[f'note_{batch}']}"
        for row in rows
        if row["path"] == paths.BCSR
        for batch in measuring.BATCHES
    ]
    return f" Kernels in the rows with BCSR: {'; '.join(found)}." if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    with arguments.refusing(parser, args.out):
        for name in args.network:
            cases.check(subjects.NETWORKS[name])
        args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("method", "sparsity", "examples", "seconds")}
    rows = []
    for name in args.network:
        subject = subjects.make(
            name,
            method=args.method,
            sparsity=args.sparsity,
            examples=args.examples,
            seed=args.seed,
            out=args.out,
        )
        further = {
            "sparsity": subject.sparsity,
            "test_examples": len(subject.test[0]),
            "seed": args.seed,
            "settings": settings,
        }
        rows += [row | further for row in measuring.measure(subject, args.seconds, args.out)]
    print(tables.of_rows(rows, COLUMNS))
    print(files.write_json(args.out / "results.json", rows))
    print(plots.draw(args.out / "accuracy_vs_ms.png", rows))
    record.keep(args.record, table(rows, args), "experiments.deploy", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
