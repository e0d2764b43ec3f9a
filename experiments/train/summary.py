"""Tables of `experiments.train`."""

import statistics
from collections.abc import Callable, Sequence

from experiments.report import tables

SHOWN = (1, 2, 3, 5, 10, 20, 30, 50, 100)  # epochs in the table, beside the last
REFERENCE = "adam"


def clock(row: dict) -> str:
    """The field with the seconds that are shown: of the processor where that does the work."""
    return "process_seconds" if row["settings"]["backend"] == "cpu" else "seconds"


def cost(row: dict, reference: dict) -> float | None:
    """Seconds of an epoch over those of another optimiser, from epochs made in turn.

    Args:
        row: An object of `results.json`.
        reference: That of the other optimiser.

    Returns:
        The ratio; None where no epoch was trained by both in one run of the script.
    """
    field = clock(row)
    pairs = [
        (one[field], other[field])
        for one, other in zip(row["history"], reference["history"], strict=False)
        if one["sitting"] == other["sitting"]
    ]
    if not pairs:
        return None
    own, others = map(sum, zip(*pairs, strict=True))
    return own / others


def until(row: dict, reference: dict) -> float | None:
    """Seconds to the last loss of another optimiser, over all of its seconds.

    Args:
        row: An object of `results.json`, of as many epochs or fewer.
        reference: That of the other optimiser.

    Returns:
        The epochs until then times `cost`, over the epochs of the other; None where the loss is
        never reached.
    """
    ratio, wanted = cost(row, reference), reference["history"][-1]["train_loss"]
    if ratio is None or wanted is None:
        return None
    for one in row["history"]:
        if one["train_loss"] is not None and one["train_loss"] <= wanted:
            return one["epoch"] * ratio / reference["epochs"]
    return None


def show(rows: Sequence[dict], score: str) -> str:
    """A table for each length of training, and one of all lengths if there are several.

    Args:
        rows: The objects of `results.json` for one model, which may differ in optimiser, length
            and seed.
        score: Field with the quality on test examples.
    """
    lengths = sorted({row["epochs"] for row in rows})
    shown = [_of_length([row for row in rows if row["epochs"] == n], score, n) for n in lengths]
    if len(lengths) > 1:
        shown.append(_of_lengths(rows, score, lengths))
    return "\n\n".join(shown)


def _of_length(rows: Sequence[dict], score: str, length: int) -> str:
    at = sorted({n for n in SHOWN if n < length} | {length})
    header = [f"{length} epochs", "rate", *map(str, at)]
    header += [f"s/{REFERENCE}'s", f"{REFERENCE}'s last loss at", "state, MB"]
    seeds = {row["seed"]: row for row in rows if row["optimizer"] == REFERENCE}
    cells = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == name]
        pairs = [(row, seeds[row["seed"]]) for row in own if row["seed"] in seeds]
        cells.append(
            [
                name,
                _rate(own[0]),
                *(_cell([_epoch(row, n) for row in own], score) for n in at),
                _median([cost(*pair) for pair in pairs]),
                _median([until(*pair) for pair in pairs]),
                f"{own[0]['state_bytes'] / 1e6:.1f}",
            ]
        )
    return tables.table(header, cells)


def _of_lengths(rows: Sequence[dict], score: str, lengths: Sequence[int]) -> str:
    cells = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == name]
        last = [[_epoch(row, n) for row in own if row["epochs"] == n] for n in lengths]
        cells.append([name, *(_cell(found, score) for found in last)])
    return tables.table(["epochs, each its own schedule", *map(str, lengths)], cells)


def _rate(row: dict) -> str:
    """The learning rate, with a star at either end of the grid, beyond which may be better ones."""
    rate, grid = row["learning_rate"], row["settings"]["trial_rates"]
    star = "*" if grid and rate in (min(grid), max(grid)) else ""
    return f"{rate:g}{star}"


def _epoch(row: dict, epoch: int) -> dict:
    """The object of an epoch; empty behind the last of a training that diverged."""
    return row["history"][epoch - 1] if epoch <= len(row["history"]) else {}


def _cell(rows: Sequence[dict], score: str) -> str:
    """Loss and score: medians over seeds; – where one of them diverged."""
    values = [[row.get(field) for row in rows] for field in ("train_loss", score)]
    if not rows or any(value is None for column in values for value in column):
        return "–"
    loss, quality = map(statistics.median, values)
    return f"{loss:.{_digits(loss)}f} ({quality:.2f})"


def _digits(loss: float) -> int:
    return 2 if loss >= 10 else 4


def _median(values: Sequence[float | None], show: Callable[[float], str] = "{:.2f}".format) -> str:
    sound = [value for value in values if value is not None]
    return show(statistics.median(sound)) if len(sound) == len(values) and sound else "–"
