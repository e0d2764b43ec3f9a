"""The tables and pictures of `experiments.imagenet`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.report import paired, plots, tables

OURS = "fishleg"
PREFIXES = ("", "recalibrated_")


def line(row: dict) -> str:
    """A result in a line, for those who wait."""
    name = f"{row['method']}, {row['compensation']}, {100 * row['sparsity_target']:g} %"
    stored, again = (f"{row[f'{p}top1']:.2f} / {row[f'{p}top5']:.2f}" for p in PREFIXES)
    return f"{name}: top-1 / top-5 {stored}, batch norm recomputed {again}"


def show(rows: Sequence[dict], at: float) -> str:
    """Tables of top-1 and top-5, of costs, and of the differences at one sparsity.

    Args:
        rows: the objects of a `results.json`, of one network and one choice of photos.
        at: the sparsity at which FishLeg and its peers are compared.
    """
    named, titles = _named(rows), tables.measurements(rows)
    photos = rows[0]["photos"]
    shown = [
        tables.by_sparsity(
            named, f"{prefix}top{top}", f"{title}top-{top} of {photos} photos, %", tables.spread
        )
        for prefix, title in titles.items()
        for top in (1, 5)
    ]
    return "\n\n".join([*shown, _costs(named), *_differences(rows, at, titles)])


def _named(rows: Sequence[dict]) -> list[dict]:
    # rows of tables and lines of pictures are by method
    return [row | {"method": f"{row['method']}, {row['compensation']}"} for row in rows]


def _costs(named: Sequence[dict]) -> str:
    header = ["", "examples", "damping", "solve damping", "fit, s", "search, s", "prune, s"]
    cells = []
    for name in dict.fromkeys(row["method"] for row in named):
        own = [row for row in named if row["method"] == name]
        predicted = max(r.get("predicted_memory_bytes", 0) for r in own)
        peaks = [r["peak_memory_bytes"] for r in own if r["peak_memory_bytes"] is not None]
        cells.append(
            [
                name,
                str(own[0]["curvature_examples"]),
                *(_number(own[0][field], ".2g") for field in ("damping", "solve_damping")),
                *(
                    _number(max(r[f"{what}_seconds"] for r in own), ".0f")
                    for what in ("fit", "search")
                ),
                _number(float(np.median([r["prune_seconds"] for r in own])), ".0f"),
                f"{predicted / 1e9:.1f}" if predicted else "–",
                f"{max(peaks) / 1e9:.1f}" if peaks else "–",
            ]
        )
    return tables.table([*header, "fit, GB predicted", "peak, GB"], cells)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _differences(rows: Sequence[dict], at: float, titles: dict[str, str]) -> list[str]:
    """By how much FishLeg is better than each peer with the same compensation, photo by photo."""
    here = {(r["method"], r["compensation"]): r for r in rows if r["sparsity_target"] == at}
    peers = [m for m in dict.fromkeys(r["method"] for r in rows) if m != OURS]
    shown = []
    for prefix, title in titles.items():
        cells = []
        for compensation in dict.fromkeys(r["compensation"] for r in rows):
            ours = here.get((OURS, compensation))
            for peer in peers if ours else ():
                theirs = here.get((peer, compensation))
                if theirs:
                    values = [
                        paired.difference(*(_ranks(r, prefix) < top for r in (ours, theirs)))
                        for top in (1, 5)
                    ]
                    cells.append([f"{peer}, {compensation}", *map(str, values)])
        if cells:
            header = f"{title}fishleg's lead at {100 * at:g} %, 95 % interval"
            shown.append(tables.table([header, "top-1, points", "top-5, points"], cells))
    return shown


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
