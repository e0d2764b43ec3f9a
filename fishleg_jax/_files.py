"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write(path: str | os.PathLike[str], writer: Callable[[BinaryIO], Any]) -> None:
    """Writes a file beside its place and renames it, so that no half-written file is seen.

    Args:
        path: Path of the file; an existing one is replaced.
        writer: Function that writes the content to an open binary file.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            writer(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
