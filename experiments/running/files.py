"""Files: written whole or not at all, and the folder of shared material beside the checkout."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.running import processes


def write(path: Path, writer: Callable[[Path], Any]) -> Path:
    """Writes a file beside its place and then renames it, so that no half-written file is seen.

    Of several processes the first one does, see `experiments.running.processes`.

    Args:
        path: where the file shall be; its folder is made when it is missing.
        writer: writes the content to the path that it is given, which has the same suffix.

    Returns:
        `path`.
    """
    if not processes.is_first():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writer(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def without_nan(value: Any) -> Any:
    """Dicts and lists with null for NaN and infinity, which JSON knows neither of."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> Path:
    """Writes a value as indented JSON; NaN and infinity become null.

    Args:
        path: where the file shall be.
        value: dicts, lists, strings and numbers.

    Returns:
        `path`.
    """
    text = json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n"
    return write(path, lambda beside: beside.write_text(text))


def shared(name: str) -> Path:
    """A file of the shared folder: `FISHLEG_SHARED`, or `../shared` beside the checkout.

    Args:
        name: the path inside the folder.

    Returns:
        The path of a file that exists.

    Raises:
        ValueError: there is no such file.
    """
    beside = Path(__file__).resolve().parents[3] / "shared"
    path = Path(os.environ.get("FISHLEG_SHARED", beside)) / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: set FISHLEG_SHARED to the folder that has {name}")
    return path
