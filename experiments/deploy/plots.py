"""The picture: accuracy against milliseconds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import ticker

from experiments.deploy.measuring import BATCHES
from experiments.report.plots import _panels, _save, _tidy


def draw(path: Path, rows: Sequence[dict]) -> Path:
    """Draws accuracy against milliseconds, a panel for each network and batch size.

    Args:
        path: the png file.
        rows: the objects of `results.json`.

    Returns:
        `path`.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    paths = list(dict.fromkeys(row["path"] for row in rows))
    figure, axes_of = _panels(len(networks) * len(BATCHES), below=1.0)
    pairs = [(network, batch) for network in networks for batch in BATCHES]
    drawn = {}
    for axes, (network, batch) in zip(axes_of, pairs, strict=True):
        for row in rows:
            if row["network"] != network:
                continue
            i = paths.index(row["path"])
            # points of equal accuracy that lie close together stay apart by their markers
            style = {"marker": "osD^v<>P*Xpd"[i % 12], "color": f"C{i % 10}", "linestyle": "none"}
            (drawn[row["path"]],) = axes.plot(
                row[f"ms_{batch}"], row["accuracy"], markersize=6, alpha=0.8, **style
            )
        axes.set(xscale="log", xlabel="milliseconds")
        # less than a decade, in which ticks of a logarithmic axis run into one another
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_title(f"{network}, batch {batch}", fontsize="medium")
        _tidy(axes)
    figure.supylabel("test accuracy, %")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2, frameon=False)
    return _save(figure, path)
