"""`metrics.jsonl`: an object a line, written as a run goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.running import files, processes


def load(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; none where there is no file.

    A line that was cut off, as a run was killed, is left out with all behind it.

    Args:
        path: a `metrics.jsonl`.
    """
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def rewind(path: Path, step: int) -> None:
    """Forgets everything after a step, for a run that goes on from there.

    Args:
        path: a `metrics.jsonl`; its objects have a `step`.
        step: the last one that stays.
    """
    kept = [row for row in load(path) if row["step"] <= step]
    text = "".join(map(_line, kept))
    files.write(path, lambda beside: beside.write_text(text))


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds objects; NaN and infinity become null.

    Args:
        path: a `metrics.jsonl`.
        rows: the objects.
    """
    if not processes.is_first():
        return
    with path.open("a") as file:
        file.write("".join(map(_line, rows)))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(files.without_nan(row), allow_nan=False) + "\n"
