"""The images that are lost, what counts for them, and mismatches by margin and memorisation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from experiments.data import datasets  # noqa: E402
from experiments.disagreement.influence import Strongest  # noqa: E402
from experiments.running import files  # noqa: E402

SHOWN = 8  # images in a row


def _save(figure, path: Path) -> Path:
    files.write(path, lambda beside: figure.savefig(beside, dpi=150, facecolor="white"))
    plt.close(figure)
    return path


def lost_images(path: Path, rows: Sequence[Mapping[str, Any]], split: datasets.Data) -> Path:
    """Draws test images that only the dense network has right, a row for each method.

    Those with the largest margin of the dense network come first.

    Args:
        path: the png file.
        rows: the objects of `results.json`, of one seed.
        split: the data set.

    Returns:
        `path`.
    """
    images, labels = split.test
    size = (1.1 * SHOWN + 1.2, 1.25 * len(rows))
    figure, grid = plt.subplots(len(rows), SHOWN, figsize=size, layout="constrained", squeeze=False)
    ends = _ends(images)
    for axes, row in zip(grid, rows, strict=True):
        predicted = dict(zip(row["where"], row["predicted"], strict=True))
        for one, i in zip(axes, row["where_lost"], strict=False):
            _draw(one, images[i], ends, f"{labels[i]} → {predicted[i]}")
        _bare(axes)
        name = row["method"].replace(", ", ",\n")
        axes[0].set_ylabel(f"{name}\n{row['lost']} lost", fontsize="small", rotation=0, ha="right")
    return _save(figure, path)


def _ends(images: Any) -> tuple[float, float]:
    """Darkest and brightest value of some images."""
    return float(np.min(images[:100])), float(np.max(images[:100]))


def _draw(axes: Any, image: Any, ends: tuple[float, float], title: str) -> None:
    image = (np.squeeze(image) - ends[0]) / (ends[1] - ends[0])
    axes.imshow(np.clip(image, 0, 1), cmap=None if image.ndim == 3 else "gray_r")
    axes.set_title(title, fontsize="x-small")


def _bare(axes: Any) -> None:
    """Hides ticks and frames."""
    for one in axes:
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)


def influential(path: Path, lost: Sequence[int], found: Strongest, split: datasets.Data) -> Path:
    """Draws lost test images, and below each the training image that counts most for it.

    Those with the strongest influence come first.

    Args:
        path: the png file.
        lost: positions of the test images.
        found: the strongest influences.
        split: the data set.

    Returns:
        `path`.
    """
    (trained, labels), (images, truth) = split
    known = [i for i in lost if found.image[i] >= 0]
    shown = sorted(known, key=lambda i: -found.score[i])[:SHOWN]
    size = (1.1 * SHOWN + 1.2, 3.0)
    figure, grid = plt.subplots(2, SHOWN, figsize=size, layout="constrained", squeeze=False)
    ends = _ends(trained)
    for (upper, lower), i in zip(grid.T, shown, strict=False):
        j = found.image[i]
        _draw(upper, images[i], ends, f"{truth[i]}")
        _draw(lower, trained[j], ends, f"{labels[j]}, {found.score[i]:+.2f}")
    for axes, name in zip(grid, ("lost", "trained on,\ninfluence"), strict=True):
        _bare(axes)
        axes[0].set_ylabel(name, fontsize="small", rotation=0, ha="right")
    return _save(figure, path)


def rates(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draws the rate of mismatches by margin (test) and by memorisation (training examples).

    Args:
        path: the png file.
        rows: the objects of `results.json`; over seeds the mean is drawn.

    Returns:
        `path`.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    titles = {
        "by_margin": "margin of the dense network, fifths of the test images",
        "by_memorisation": "memorisation, groups of the training images",
    }
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row[field] for row in rows if row["method"] == method]
            mean = np.mean([[group[-1] for group in groups] for groups in own], axis=0)
            axes.plot(range(1, len(mean) + 1), mean, label=method, marker="o", markersize=4)
        groups = rows[0][field]
        names = [f"{group[0]:.2g} to\n{group[1]:.2g}" for group in groups]
        axes.set_xticks(range(1, len(groups) + 1), names, fontsize="x-small")
        axes.set(xlabel=title, ylabel="predictions that differ, %")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize="small")
    return _save(figure, path)
