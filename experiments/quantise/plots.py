"""The picture: energies of solvers against seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.report.plots import _panels, _save, _tidy


def draw(path: Path, panels: Mapping[tuple[str, str], Sequence[Mapping]]) -> Path:
    """Draws the energies of solvers on blocks against their seconds, a panel for each size.

    Args:
        path: The png file.
        panels: By title of a panel and of its energies: rows with `solver`, `energies` of all
            blocks and `seconds` of one.

    Returns:
        `path`.
    """
    figure, found = _panels(len(panels), below=1.1)
    for axes, ((title, energy), rows) in zip(found, panels.items(), strict=True):
        for i, row in enumerate(rows):
            times = [row["seconds"]] * len(row["energies"])
            axes.scatter(
                times, row["energies"], s=12, alpha=0.6, color=f"C{i}", label=row["solver"]
            )
        axes.set(xscale="log", xlabel="seconds a block", ylabel=energy, title=title)
        _tidy(axes)
    longest = max(found, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    figure.legend(
        *longest.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    return _save(figure, path)
