"""A picture of one number for each method: the median over seeds, the range, and every seed."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from experiments.report.curves import Curve
from experiments.running import files


def points(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    along: str,
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Draws one panel beside the other, with a line for each name.

    Args:
        path: the png file.
        panels: curves by name, by the title of their panel, all at one and the same place.
        along: name of the x axis.
        levels: a dotted line in a panel, such as the accuracy of the dense network.

    Returns:
        `path`.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for own in panels.values() for name in own))
    size = (3.4 * len(panels) + 1.4, 0.3 * len(names) + 1.1)
    figure, grid = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (title, own) in zip(grid[0], panels.items(), strict=True):
        for height, name in enumerate(names):
            (values,) = own.get(name, {None: []}).values()
            if not values:
                continue
            color = f"C{height}"
            axes.plot([min(values), max(values)], [height, height], color=color, alpha=0.4)
            axes.plot(values, [height] * len(values), "|", color=color)
            axes.plot(statistics.median(values), height, "o", color=color, markersize=5)
        if levels and title in levels:
            axes.axvline(levels[title], color="grey", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(along)
        axes.grid(alpha=0.3)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].invert_yaxis()  # the first name at the top
    files.write(path, lambda beside: figure.savefig(beside, dpi=120))
    plt.close(figure)
    return path
