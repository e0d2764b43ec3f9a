"""A picture of curves over seeds: medians with their range."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.running import files

LETTER, LINE = 0.08, 0.6  # inches that a letter and the line before a name take in the legend
# values over seeds by place on the x axis
Curve = Mapping[float, Sequence[float]]


def gathered(
    rows: Sequence[Mapping], label: Callable[[Mapping], str], across: str, up: str
) -> tuple[dict[str, dict[str, dict[float, list]]], dict[str, float]]:
    """Curves of a `results.json`: a panel for each model, and the level of the dense network.

    Args:
        rows: its objects.
        label: the name of the curve that an object belongs to.
        across: the setting on the x axis, a share, drawn in percent.
        up: the field on the y axis; that of the dense network begins with `dense_`.

    Returns:
        `panels` and `levels` of `curves`.
    """
    panels: dict[str, dict[str, dict[float, list]]] = {}
    for row in rows:
        curve = panels.setdefault(row["model"], {}).setdefault(label(row), {})
        curve.setdefault(100 * row["settings"][across], []).append(row[up])
    return panels, {row["model"]: row[f"dense_{up}"] for row in rows}


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    across: str,
    up: str,
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Draws one panel beside the other, with one legend.

    Args:
        path: where the picture shall be.
        panels: curves by name, by the title of their panel.
        across: name of the x axis.
        up: name of the y axis.
        levels: a dotted line in a panel, such as the accuracy of the dense network.

    Returns:
        The path.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for own in panels.values() for name in own))
    width = 3.4 * len(panels) + 0.6
    fitting = int(width / (LETTER * max(map(len, names)) + LINE))
    columns = min(max(fitting, 1), 3)
    height = 2.9 + 0.22 * -(-len(names) // columns)
    figure, rows = plt.subplots(
        1, len(panels), figsize=(width, height), squeeze=False, layout="constrained"
    )
    drawn = {}
    for axes, (title, own) in zip(rows[0], panels.items(), strict=True):
        for name, curve in own.items():
            places = sorted(curve)
            middle = [statistics.median(curve[x]) for x in places]
            ends = [[pick(curve[x]) for x in places] for pick in (min, max)]
            color = f"C{names.index(name)}"
            (line,) = axes.plot(places, middle, marker="o", markersize=3, color=color)
            axes.fill_between(places, *ends, color=color, alpha=0.15, linewidth=0)
            drawn.setdefault(name, line)
        if levels and title in levels:
            axes.axhline(levels[title], color="grey", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(across)
        axes.grid(alpha=0.3)
    rows[0][0].set_ylabel(up)
    figure.legend(
        drawn.values(),
        drawn.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    files.write(path, lambda beside: figure.savefig(beside, dpi=120))
    plt.close(figure)
    return path
