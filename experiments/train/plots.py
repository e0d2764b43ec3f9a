"""The picture: training loss against steps, and against seconds."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.report.plots import _save, _tidy
from experiments.train.summary import clock


def draw(path: Path, rows: Sequence[dict], title: str) -> Path:
    """Draws the training loss against steps and seconds, a row of panels for each length.

    Args:
        path: The png file.
        rows: The objects of a `results.json` for one model; over seeds medians are drawn.
        title: The title of the picture.

    Returns:
        `path`.
    """
    lengths = sorted({row["epochs"] for row in rows})
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, grid = plt.subplots(
        len(lengths),
        2,
        figsize=(9.6, 3.4 * len(lengths) + 0.8),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    drawn = {}
    for (left, right), length in zip(grid, lengths, strict=True):
        for name in names:
            own = [r for r in rows if r["epochs"] == length and r["optimizer"] == name]
            if not own:
                continue
            steps, seconds, loss = _curve(own)
            style = {"color": f"C{names.index(name)}", "linewidth": 1.4, "marker": "o"}
            style["markersize"] = 3
            (drawn[name],) = left.plot(steps, loss, **style)
            right.plot(seconds, loss, **style)
        left.set(yscale="log", xlabel="steps", ylabel="training loss, nats")
        kind = "CPU seconds" if clock(rows[0]) == "process_seconds" else "seconds"
        right.set(xscale="log", xlabel=f"{kind}, without evaluation and compilation")
        for axes in (left, right):
            axes.set_title(f"{length} epochs", fontsize="medium")
            _tidy(axes)
    figure.suptitle(title)
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn), frameon=False
    )
    return _save(figure, path)


def _curve(rows: Sequence[dict]) -> tuple[list, list, list]:
    """Steps, seconds and losses after every epoch that all seeds have reached: medians."""
    field = clock(rows[0])
    histories = [row["history"] for row in rows]
    times = [list(itertools.accumulate(one[field] for one in history)) for history in histories]
    steps, seconds, losses = [], [], []
    for epoch in range(min(map(len, histories))):
        found = [history[epoch]["train_loss"] for history in histories]
        if None in found:
            break
        steps.append(histories[0][epoch]["step"])
        seconds.append(statistics.median(one[epoch] for one in times))
        losses.append(statistics.median(found))
    return steps, seconds, losses
