"""The tables and pictures of `experiments.imagenet`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.report import paired, plots, record

OURS = "fishleg"
PREFIXES = ("", "recalibrated_")


def line(row: dict) -> str:
    """A result in a line, for those who wait."""
    name = f"{row['method']}, {row['compensation']}, {100 * row['sparsity_target']:g} %"
    stored, again = (f"{row[f'{p}top1']:.2f} / {row[f'{p}top5']:.2f}" for p in PREFIXES)
    return f"{name}: top-1 / top-5 {stored}, batch norm recomputed {again}"


def made(rows: Sequence[dict], at: float) -> dict[str, record.Table]:
    """Tables of top-1 and top-5, of costs, and of FishLeg's lead over its peers at one sparsity.

    Args:
        rows: the objects of a `results.json`, of one network and one choice of photos.
        at: the sparsity at which FishLeg and its peers are compared.

    Returns:
        The tables by what is in them: `top1`, `top5`, `cost`, and `lead` where there are peers.
    """
    named = _named(rows)
    found = {f"top{top}": _of_top(named, top) for top in (1, 5)}
    found["cost"] = _costs(named)
    lead = _lead(rows, at)
    return found | ({"lead": lead} if lead.rows else {})


def _table(
    title: str, columns: list[str], cells: list, decimals: list[int], rows: Sequence[dict]
) -> record.Table:
    first = rows[0]
    held_out, tuned = first["settings"]["held_out"], first["settings"]["tuned_at"]
    dense = " / ".join(f"{first[f'dense_top{top}']:.2f}" for top in (1, 5))
    examples = max(row["curvature_examples"] for row in rows)
    return record.Table(
        title=title,
        columns=["", *columns],
        rows=cells,
        decimals=[0, *decimals],
        seed=record.seeds(rows),
        data=f"{first['photos']:,} photos of {first['dataset']} to test (dense {dense}), "
        f"{first['model']}, {first['prunable_weights']:,} weights",
        examples=f"{examples:,} calibration photos; dampings chosen at {100 * tuned:g} % on "
        f"{held_out} others",
    )


def _named(rows: Sequence[dict]) -> list[dict]:
    # rows of tables and lines of pictures are by method
    return [row | {"method": f"{row['method']}, {row['compensation']}"} for row in rows]


def _of_top(named: Sequence[dict], top: int) -> record.Table:
    title = f"top-{top} in %, batch norm as stored and recomputed"
    fields = [f"{prefix}top{top}" for prefix in PREFIXES]
    stored, again = (record.at_sparsities(named, x, title, examples="") for x in fields)
    columns = [*stored.columns[1:], *(f"recomputed, {x}" for x in again.columns[1:])]
    pairs = zip(stored.rows, again.rows, strict=True)
    return _table(title, columns, [[*a, *b[1:]] for a, b in pairs], [2] * len(columns), named)


def _costs(named: Sequence[dict]) -> record.Table:
    columns = ["examples", "damping", "of the solve", "fit, s", "search, s", "prune, s"]
    columns += ["fit, GB predicted", "peak, GB"]
    cells = []
    for name in dict.fromkeys(row["method"] for row in named):
        own = [row for row in named if row["method"] == name]
        predicted = max(row.get("predicted_memory_bytes") or 0 for row in own)
        peaks = [r["peak_memory_bytes"] for r in own if r["peak_memory_bytes"] is not None]
        cells.append(
            [
                name,
                float(own[0]["curvature_examples"]),
                *(_short(own[0][field]) for field in ("damping", "solve_damping")),
                *(max(row[f"{what}_seconds"] for row in own) for what in ("fit", "search")),
                float(np.median([row["prune_seconds"] for row in own])),
                predicted / 1e9 or None,
                max(peaks) / 1e9 if peaks else None,
            ]
        )
    return _table("Dampings, seconds, memory", columns, cells, [0, 0, 0, 0, 0, 0, 1, 1], named)


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"


def _lead(rows: Sequence[dict], at: float) -> record.Table:
    """By how much FishLeg is better than each peer with the same compensation, photo by photo."""
    here = {(r["method"], r["compensation"]): r for r in rows if r["sparsity_target"] == at}
    compensations = [c for c in dict.fromkeys(c for _, c in here) if (OURS, c) in here]
    compared = [(p, c) for p in PREFIXES for c in compensations]
    words = dict(zip(PREFIXES, ("as stored", "recomputed"), strict=True))
    columns = [f"{words[p]}, {c}, top-{top}" for p, c in compared for top in (1, 5)]

    def lead(peer: str, prefix: str, compensation: str, top: int) -> str | None:
        pair = here[OURS, compensation], here.get((peer, compensation))
        if pair[1] is None:
            return None
        return str(paired.difference(*(_ranks(row, prefix) < top for row in pair)))

    cells = []
    for peer in dict.fromkeys(method for method, _ in here if method != OURS):
        cells.append([f"over {peer}", *(lead(peer, p, c, t) for p, c in compared for t in (1, 5))])
    title = f"FishLeg's lead at {100 * at:g} % in points, paired over photos, 95 % interval"
    return _table(title, columns, cells if columns else [], [0] * len(columns), rows)


def _ranks(row: dict, prefix: str) -> np.ndarray:
    return np.array(row[f"{prefix}ranks"].split(), int)


def draw(out: Path, rows: Sequence[dict]) -> list[Path]:
    """Draws top-1 against sparsity, with batch norm as stored and recomputed.

    Args:
        out: the folder for the pictures.
        rows: see `show`.

    Returns:
        Their paths.
    """
    how = {"": "batch norm as stored", "recalibrated_": "batch norm recomputed"}
    return [
        plots.accuracy_vs_sparsity(
            out / f"{prefix}top1_vs_sparsity.png",
            _named(rows),
            field=f"{prefix}top1",
            name=f"top-1 of {rows[0]['photos']} photos, %",
            how=f"one shot, {how[prefix]}",
        )
        for prefix in PREFIXES
    ]
