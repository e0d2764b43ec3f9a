"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fishleg_jax import _text


def check_place(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Returns a path at which a file can be written.

    Raises:
        ValueError: Not a path, one in a folder that does not exist, or that of a folder.
    """
    try:
        place = Path(path)
    except TypeError:
        raise ValueError(
            f"{argument} must be the path of a file, got {_text.shown(path)}"
        ) from None
    if not place.parent.is_dir():
        raise ValueError(
            f"{argument}: the folder {str(place.parent)!r} does not exist: create it first"
        )
    if place.is_dir():
        raise ValueError(f"{argument} must be the path of a file, got the folder {str(place)!r}")
    return place


def write(path: str | os.PathLike[str], writer: Callable[[BinaryIO], Any]) -> None:
    """Writes a file beside its place and renames it, so that no half-written file is seen.

    Args:
        path: Path of the file; an existing one is replaced.
        writer: Function that writes the content to an open binary file.

    Raises:
        ValueError: The folder does not exist.
    """
    path = check_place(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            writer(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
