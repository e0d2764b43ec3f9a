"""The pictures of `experiments.quadratic`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.report.plots import _panels, _save, _tidy


def _title(row: dict) -> str:
    return f"{row['model']} on {row['dataset']}, {100 * row['sparsity_target']:g} % pruned"


def quadratic(path: Path, rows: Sequence[dict]) -> Path:
    """Draws measured and predicted increases of the loss, a panel for each method.

    Args:
        path: the png file.
        rows: the objects of `quadratic.json`.

    Returns:
        `path`.
    """
    figure, panels = _panels(len(rows), below=0.5)
    for i, (axes, row) in enumerate(zip(panels, rows, strict=True)):
        axes.plot(row["t"], row["measured"], color="black", marker="o", markersize=3)
        axes.plot(row["t"], row["predicted"], color="tab:orange", linewidth=1.6)
        axes.plot(row["t"], row["predicted_exact"], color="tab:blue", linestyle="--")
        axes.set_title(row["method"])
        # predictions may be off by orders of magnitude; only positive ones are drawn
        axes.set_yscale("log", nonpositive="mask")
        if i + 3 >= len(rows):
            axes.set_xlabel("t, from dense to pruned")
        _tidy(axes)
    figure.suptitle(_title(rows[0]))
    figure.supylabel("increase of the loss, nats")
    names = ("measured", "predicted", "predicted, exact Fisher")
    figure.legend(panels[0].lines, names, loc="outside lower center", ncols=3, frameon=False)
    return _save(figure, path)


def damping(path: Path, rows: Sequence[dict]) -> Path:
    """Draws accuracy against damping, a line for each method; those without damping lie level.

    Args:
        path: the png file.
        rows: the objects of `damping.json`.

    Returns:
        `path`.
    """
    figure, axes = plt.subplots(figsize=(7.6, 4.0), layout="constrained")
    axes.set_title(_title(rows[0]))
    axes.set(xscale="log", xlabel="damping", ylabel="test accuracy, %")
    _tidy(axes)
    dense = rows[0]["dense_accuracy"]
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label=f"dense ({dense:.1f})")
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        accuracies = [row["accuracy"] for row in mine]
        if mine[0]["damping"] is None:
            axes.axhline(accuracies[0], color="grey", linewidth=1.6, label=f"{method}, the limit")
        else:
            dampings = [row["damping"] for row in mine]
            # smaller and smaller: woodfisher and mfac are one estimate, and lie upon each other
            size = max(9 - 1.5 * i, 3)
            axes.plot(dampings, accuracies, marker="osD^v"[i % 5], markersize=size, label=method)
    figure.legend(loc="outside right upper", frameon=False)
    return _save(figure, path)
