"""The tables of `experiments.scaling`."""

from collections.abc import Iterator, Sequence

from experiments.report import record
from experiments.scaling import shapes

SHOWN = (1, 8, 64, 256)  # devices
KINDS = {"trace": "traced", "dearest": "traced, dearest branches", "lowered": "XLA, lowered"}


def of_bytes(rows: Sequence[dict]) -> record.Table:
    """Bytes of weights and of states on each device.

    Args:
        rows: the rows of `experiments.scaling`'s `run`, of one network after the other.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for network, own in _by_network(rows).items():
        weights = own[methods[0]]["weight_bytes"]
        for devices in SHOWN:
            states = [_number(own[method]["state_bytes"][devices]) for method in methods]
            cells.append([network, str(devices), _number(weights[devices]), *states])
    columns = ["", "devices", "weights", *methods]
    return _table("Bytes on each device", columns, cells, rows)


def of_operations(rows: Sequence[dict]) -> record.Table:
    """Operations of a gradient and of an estimate's functions.

    Args:
        rows: see `of_bytes`.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for network, own in _by_network(rows).items():
        for function in next(iter(own.values()))["flops"]:
            for words, gradient, *counts in _counts(function, list(own.values())):
                # beside an update stands the gradient of a loss, which every training step takes
                beside = gradient if function == "update" else None
                cells.append([network, function, words, *map(_number, [beside, *counts])])
    columns = ["", "of", "counted", "a gradient", *methods]
    return _table("Operations", columns, cells, rows)


def _counts(function: str, rows: Sequence[dict]) -> Iterator[list]:
    """For every way of counting its words, the operations of a gradient and of all methods."""
    first = rows[0]
    before = None
    for kind, words in KINDS.items():
        counts = [first["gradient_flops"]["gradient"][kind]]
        counts += [row["flops"][function][kind] for row in rows]
        if kind != "dearest" or counts != before:  # where there is a conditional
            yield [words, *counts]
        before = counts
    for devices, gradient in first["gradient_compiled_flops"].items():
        counts = [row["compiled_flops"].get(devices, {}).get(function) for row in rows]
        yield [f"compiled, each of {devices}", gradient["gradient"], *counts]


def _by_network(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """The rows by the titles of their networks and by method."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        title = f"{row['network']}, {row['weights'] / 1e6:,.1f} M weights"
        found.setdefault(title, {})[row["method"]] = row
    return found


def _table(title: str, columns: list[str], cells: list, rows: Sequence[dict]) -> record.Table:
    updates = {
        f"{row['network']}: {row['examples']} "
        + (f"texts of {shapes.TOKENS} tokens" if row["network"] in ("1B", "8B") else "images")
        for row in rows
    }
    return record.Table(
        title=title,
        columns=columns,
        rows=cells,
        decimals=[0] * len(columns),
        seed="none",
        data="shapes alone",
        examples="of an update, " + ", ".join(sorted(updates)),
        note="Counted, not measured.",
    )


def _number(value: float | None) -> str:
    """Three digits and a prefix; nothing where there is no number."""
    if value is None:
        return ""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g}"
