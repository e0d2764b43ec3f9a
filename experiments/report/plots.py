"""The pictures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402

from experiments.report.tables import select  # noqa: E402
from experiments.running import files  # noqa: E402


def _tidy(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure, path: Path) -> Path:
    files.write(path, lambda beside: figure.savefig(beside, dpi=150, facecolor="white"))
    plt.close(figure)
    return path


def _panels(count: int, below: float = 0.0) -> tuple:
    # a figure of several panels, three in a row, with inches to spare below them
    columns = min(3, count)
    rows = -(-count // columns)
    size = (3.2 * columns, 2.6 * rows + below)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid.flat[:count]


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 0.5 for a, b in zip(one, other, strict=True))


def accuracy_vs_sparsity(
    path: Path,
    results: Sequence[dict],
    *,
    field: str = "accuracy",
    name: str = "test accuracy, %",
    how: str | None = None,
) -> Path:
    """Draws accuracy against sparsity, a line for each method, and the dense accuracy.

    Args:
        path: the png file.
        results: the objects of a `results.json` for one model; over seeds the median is drawn, and
            the range behind it.
        field: the field to draw.
        name: its name on the axis.
        how: words for the pruning, in the title; None to derive them from the number of stages.

    Returns:
        `path`.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    if how is None:
        stages = max(result["settings"].get("stages", 1) for result in results)
        how = "one shot" if stages == 1 else f"{stages} stages"
    axes.set_title(f"{results[0]['model']} on {results[0]['dataset']}, {how}")
    axes.set(xlabel="sparsity, %", ylabel=name)
    _tidy(axes)
    dense = statistics.median(select(results, f"dense_{field}"))
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label=f"dense ({dense:.1f})")
    # where something else was to be reached, results lie where they came to
    at = lambda r: r["sparsity"] if isinstance(r["sparsity_target"], str) else r["sparsity_target"]  # noqa: E731
    results = [result | {"at": at(result)} for result in results]
    targets = sorted({result["at"] for result in results})
    percent = [100 * target for target in targets]
    drawn = []
    for method in dict.fromkeys(result["method"] for result in results):
        found = {t: select(results, field, method=method, at=t) for t in targets}
        found = {100 * target: values for target, values in found.items() if values}
        middle = [statistics.median(values) for values in found.values()]
        # woodfisher and mfac are one estimate: a line that would hide another is dashed
        hiding = any(_close(middle, other) for other in drawn)
        drawn.append(middle)
        style = {"linestyle": (0, (3, 3)) if hiding else "-", "marker": "o", "markersize": 4}
        (line,) = axes.plot(list(found), middle, label=method, **style)
        low, high = ([pick(values) for values in found.values()] for pick in (min, max))
        axes.fill_between(list(found), low, high, color=line.get_color(), alpha=0.2)
    if len(percent) <= 10:
        axes.set_xticks(percent, [f"{p:g}" for p in percent])
    axes.legend(loc="upper left" if field.endswith("loss") else "lower left", frameon=False)
    return _save(figure, path)


def training(path: Path, runs: Mapping[float, Mapping[str, Sequence[dict]]]) -> Path:
    """Draws loss, sparsity and auxiliary loss against the step, a row for each final sparsity.

    Args:
        path: the png file.
        runs: by sparsity and method, the objects of `metrics.jsonl`.
    """
    drawn = {"loss": "loss of the batch", "sparsity": "sparsity", "auxiliary_loss": "auxiliary"}
    size = (9.6, 2.6 * len(runs) + 0.4)
    figure, grid = plt.subplots(
        len(runs), 3, figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    names = list(dict.fromkeys(method for run in runs.values() for method in run))
    lines = {}
    for row, (sparsity, run) in zip(grid, runs.items(), strict=True):
        for axes, (field, title) in zip(row, drawn.items(), strict=True):
            for method, told in run.items():
                found = [(r["step"], r[field]) for r in told if r.get(field) is not None]
                style = {"color": f"C{names.index(method)}", "linewidth": 1}
                if found:
                    (lines[method],) = axes.plot(*zip(*found, strict=True), **style)
            axes.set_title(f"{title}, to {100 * sparsity:g} %", fontsize="medium")
            _tidy(axes)
        row[0].set_yscale("log")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False
    )
    return _save(figure, path)


def convergence(path: Path, losses: Mapping[str, Sequence[float]]) -> Path:
    """Draws the smoothed auxiliary loss over its size at the start, a panel for each model.

    Args:
        path: the png file.
        losses: for each model the auxiliary loss after every update; it is negative.

    Returns:
        `path`.
    """
    figure, panels = _panels(len(losses))
    for axes, (name, values) in zip(panels, losses.items(), strict=True):
        axes.plot([value / abs(values[0]) for value in values], linewidth=1.2)
        axes.set_title(name)
        _tidy(axes)
    figure.supxlabel("auxiliary update")
    figure.supylabel("auxiliary loss / |at start|")
    return _save(figure, path)


def preconditioning(path: Path, results: Sequence[dict]) -> Path:
    """Draws relative residuals against iterations, a panel for each system.

    A line is one seed's; those of estimates that were fitted to the dense network are dashed.

    Args:
        path: the png file.
        results: the objects of the `results.json` of `experiments.preconditioning`.

    Returns:
        `path`.
    """
    names = ("model", "sparsity_target", "damping")
    systems = dict.fromkeys(tuple(row[name] for name in names) for row in results)
    methods = list(dict.fromkeys(row["method"] for row in results))
    figure, panels = _panels(len(systems), below=1.0)
    drawn = {}
    for axes, system in zip(panels, systems, strict=True):
        for row in results:
            if tuple(row[name] for name in names) != system:
                continue
            dense = row["fit"] == "dense"
            label = f"{row['method']}, fitted dense" if dense else row["method"]
            style = {
                "color": f"C{methods.index(row['method'])}",
                "linestyle": "--" if dense else "-",
            }
            (drawn[label],) = axes.plot(row["history"]["residual"], linewidth=1.2, **style)
        model, sparsity, damping = system
        axes.set_title(f"{model}, {100 * sparsity:g} %, γ = {damping:g}", fontsize="medium")
        axes.set(xlabel="iteration", yscale="log")
        _tidy(axes)
    figure.supylabel("relative residual")
    _legend_below(figure, drawn, min(3, len(systems)))
    return _save(figure, path)


def assimilation(path: Path, name: str, rows: Sequence[dict], estimates: Sequence[str]) -> Path:
    """Draws relative residuals at mask updates against the step, a line for each estimate.

    Args:
        path: the png file.
        name: of the model.
        rows: the objects of the `assimilation.json` of `experiments.assimilation`.
        estimates: the fields that are drawn.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    steps = [row["step"] for row in rows]
    for field in estimates:
        axes.plot(steps, [row[field] for row in rows], label=field, marker="o", markersize=3)
    axes.set_title(f"{name}, pruned while it is trained")
    axes.set(xlabel="step", ylabel="relative residual", yscale="log")
    _tidy(axes)
    axes.legend(frameon=False)
    return _save(figure, path)


def against_weights(path: Path, rows: Sequence[dict]) -> Path:
    """Draws seconds and bytes of updates against the number of weights, both axes logarithmic.

    Args:
        path: the png file.
        rows: the measurements of `experiments.benchmarks.fit_scaling`.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    fields = {"learning_s": "seconds of a learning update", "peak_bytes": "peak, bytes"}
    for axes, (field, title) in zip(panels, fields.items(), strict=True):
        for family, cap in dict.fromkeys((row["family"], row["cap"]) for row in rows):
            own = [row for row in rows if (row["family"], row["cap"]) == (family, cap)]
            found = [(row["weights"], row[field]) for row in own if row[field]]
            style = {"linestyle": "--" if cap is None else "-", "marker": "o", "markersize": 4}
            label = f"{family}, {'no cap' if cap is None else f'cap {cap}'}"
            axes.plot(*zip(*found, strict=True), label=label, **style)
        axes.set(xlabel="weights", ylabel=title, xscale="log", yscale="log")
        _tidy(axes)
    panels[0].legend(frameon=False)
    return _save(figure, path)


def loss_above_dense(path: Path, results: Sequence[dict]) -> Path:
    """Draws the loss above that of the dense network against sparsity, a panel for each network.

    Lines are medians over seeds.  The axis is logarithmic but near zero, where losses below that
    of the dense network have their place.

    Args:
        path: the png file.
        results: the objects of the `results.json` of `experiments.arena`, of one mode.

    Returns:
        `path`.
    """
    names = list(dict.fromkeys(row["model"] for row in results))
    methods = list(dict.fromkeys(row["method"] for row in results))
    figure, panels = _panels(len(names), below=0.6)
    drawn = {}
    for axes, name in zip(panels, names, strict=True):
        own = [row for row in results if row["model"] == name and row["above_dense"] is not None]
        hidden = []
        for method in methods:
            mine = [row for row in own if row["method"] == method]
            if not mine:
                continue
            targets = sorted({row["sparsity_target"] for row in mine})
            middle = [
                statistics.median(select(mine, "above_dense", sparsity_target=target))
                for target in targets
            ]
            # woodfisher and mfac are one estimate: a line that would hide another is dashed
            hiding = any(_same(middle, other) for other in hidden)
            hidden.append(middle)
            style = {
                "color": f"C{methods.index(method)}",
                "linestyle": (0, (3, 3)) if hiding else "-",
                "linewidth": 2 if method == "fishleg" else 1,
                "marker": "o",
                "markersize": 3,
            }
            percent = [100 * target for target in targets]
            (line,) = axes.plot(percent, middle, **style)
            drawn.setdefault(method, line)
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("sparsity, %")
        _tidy(axes)
    figure.supylabel("test loss above dense, nats")
    _legend_below(figure, drawn, min(4, len(drawn)))
    return _save(figure, path)


def _legend_below(figure, drawn: Mapping, columns: int) -> None:
    """One legend for all panels, under them."""
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= 0.01 * max(abs(a), abs(b)) for a, b in zip(one, other, strict=True)
    )
