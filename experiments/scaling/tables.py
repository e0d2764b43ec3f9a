"""Markdown tables of `experiments.scaling`."""

from collections.abc import Sequence

from experiments.scaling import shapes

SHOWN = (1, 8, 64, 256)  # devices


def show(rows: Sequence[dict]) -> str:
    """Two tables for one network: of bytes and of operations.

    Args:
        rows: the rows of `experiments.scaling`'s `run`.
    """
    name, weights, examples = (rows[0][key] for key in ("network", "weights", "examples"))
    kind = f"texts of {shapes.TOKENS} tokens" if name in ("1B", "8B") else "images"
    title = f"**{name}**, {weights / 1e6:,.1f} million weights, updates of {examples} {kind}"
    return "\n".join([title, "", *_bytes(rows), "", *_operations(rows), ""])


def _bytes(rows: Sequence[dict]) -> list[str]:
    lines = _header(["bytes on each of", *map(str, SHOWN), "numbers a weight"])
    weights = rows[0]["weight_bytes"]
    for name, found in [("weights", weights)] + [(r["method"], r["state_bytes"]) for r in rows]:
        each = f"{found[1] / weights[1]:.2f}"
        lines.append(_line([name, *(_number(found[n]) for n in SHOWN), each]))
    return lines


def _operations(rows: Sequence[dict]) -> list[str]:
    devices = sorted({n for row in rows for n in row["compiled_flops"]})
    header = ["operations", "of", "traced", "dearest", "XLA, lowered"]
    lines = _header([*header, *(f"compiled, each of {n}" for n in devices)])
    gradient = {"traced": rows[0]["gradient_flops"], "compiled": rows[0]["gradient_compiled_flops"]}
    methods = [("", gradient)]
    methods += [
        (r["method"], {"traced": r["flops"], "compiled": r["compiled_flops"]}) for r in rows
    ]
    for method, found in methods:
        for function, counted in found["traced"].items():
            on = [found["compiled"].get(n, {}).get(function) for n in devices]
            cells = [counted[kind] for kind in ("trace", "dearest", "lowered")]
            lines.append(_line([method, function, *map(_number, [*cells, *on])]))
    return lines


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    """Three digits and a prefix; nothing where there is no number."""
    if value is None:
        return ""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g}"
