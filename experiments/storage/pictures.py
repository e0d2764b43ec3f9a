"""Accuracy against cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from experiments.running import files  # noqa: E402

LINES = {"equal": "--", "by weight": ":", "by row": "-"}


def accuracy_vs_cells(path: Path, rows: Sequence[Mapping[str, Any]], weights: int) -> Path:
    """Draws accuracy against all cells, protected bits among them, over the number of weights.

    Args:
        path: the png file.
        rows: the objects of `results.json` for one model; means over draws and seeds are drawn, and
            95 % intervals behind them.
        weights: number of weights of the dense network.

    Returns:
        `path`.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    names = list(dict.fromkeys(row["network"] for row in rows))
    for i, name in enumerate(names):
        for allotment in dict.fromkeys(row["allotment"] for row in rows):
            own = [r for r in rows if r["network"] == name and r["allotment"] == allotment]
            if allotment == "digital":
                place = np.mean([r["total_cells"] for r in own]) / weights
                accuracy = np.mean([r["accuracies"] for r in own])
                label = f"{name}, 8 bits and error correction"
                axes.plot([place], [accuracy], "*", color=f"C{i}", markersize=10, label=label)
                continue
            places = sorted({r["each"] for r in own})
            drawn = [[r for r in own if r["each"] == each] for each in places]
            cells = [np.mean([r["total_cells"] for r in one]) / weights for one in drawn]
            values = [np.concatenate([r["accuracies"] for r in one]) for one in drawn]
            middle = np.array([x.mean() for x in values])
            error = np.array([1.96 * x.std(ddof=1) / len(x) ** 0.5 for x in values])
            style = {"color": f"C{i}", "linestyle": LINES[allotment]}
            axes.plot(cells, middle, label=f"{name}, {allotment}", **style, marker="o", ms=3)
            axes.fill_between(cells, middle - error, middle + error, color=f"C{i}", alpha=0.15)
    axes.set(xscale="log", xlabel="cells for a weight of the dense network", ylabel="accuracy, %")
    axes.set_title(f"{rows[0]['model']}, cells: {rows[0]['settings']['cell']}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    files.write(path, lambda beside: figure.savefig(beside, dpi=150, facecolor="white"))
    plt.close(figure)
    return path
