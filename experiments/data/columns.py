"""Columns of a data set: arrays whose rows are read from disk as they are asked for."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.running import files, processes


@dataclass(frozen=True, eq=False)
class Column:
    """Like an array with only the rows last asked for in memory.

    Attributes:
        read: from the numbers of rows, `(count,)`, to these rows, `(count, *row_shape)`.
        rows: the numbers of the rows that it has.
        row_shape: the shape of a row.
        dtype: of its values.
    """

    read: Callable[[np.ndarray], np.ndarray]
    rows: range
    row_shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        """How many rows it has."""
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return (len(self.rows), *self.row_shape)

    def __getitem__(self, index: Any) -> Any:
        """Reads some rows, as NumPy's indexing chooses them; a slice reads nothing yet."""
        if isinstance(index, slice):
            return Column(self.read, self.rows[index], self.row_shape, self.dtype)
        own = self.rows
        chosen = np.asarray(np.arange(own.start, own.stop, own.step)[index])
        return self.read(chosen.ravel()).reshape(*chosen.shape, *self.row_shape)

    def then(
        self,
        change: Callable[[np.ndarray], np.ndarray],
        row_shape: tuple[int, ...] | None = None,
        dtype: Any = np.float32,
    ) -> "Column":
        """A column of the same rows, changed as they are read.

        Args:
            change: from rows to as many others.
            row_shape: of these; None for the same as before.
            dtype: of these.
        """
        shape = self.row_shape if row_shape is None else row_shape
        return Column(lambda rows: change(self.read(rows)), self.rows, shape, np.dtype(dtype))

    def whole(self) -> np.ndarray:
        """All rows, in memory."""
        return self[np.arange(len(self))]


class Columns(NamedTuple):
    """The columns of a split: images as they are stored, in bytes, and labels as int32."""

    images: Column
    labels: Column


def split(cache: Path, examples: Callable[[], Sequence[dict]]) -> Columns:
    """The columns of a split, decoded once: by the first process, while others wait.

    Where the decoded images can't be kept, or a process does not see those that the first one has
    kept, rows are decoded each time that they are asked for.

    Args:
        cache: where the decoded images shall be, without the `-images.npy` at the end.
        examples: opens the examples, decoded as they are asked for: `image` and `label`.
    """
    if processes.is_first() and _kept(cache) is None:
        with contextlib.suppress(OSError):  # the folder may only be read, or the disk is full
            _keep(cache, examples())
    processes.wait(str(cache))
    kept = _kept(cache)
    return _of_examples(examples()) if kept is None else kept


def _paths(cache: Path) -> tuple[Path, Path]:
    return tuple(cache.with_name(f"{cache.name}-{what}.npy") for what in ("images", "labels"))


def _kept(cache: Path) -> Columns | None:
    """The columns of files, as memory maps; None where they are missing or broken."""
    try:
        arrays = [np.load(path, mmap_mode="r") for path in _paths(cache)]
    except (OSError, EOFError, ValueError):
        return None
    if len({len(x) for x in arrays}) > 1:
        return None
    return Columns(
        *(Column(lambda i, x=x: x[i], range(len(x)), x.shape[1:], x.dtype) for x in arrays)
    )


def _keep(cache: Path, examples: Sequence[dict]) -> None:
    """Decodes all examples, and writes each as soon as it is there."""
    images, labels = _paths(cache)
    found = np.empty(len(examples), np.int32)
    first = examples[0]["image"]
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (len(examples), *first.shape),
    }

    def write(beside: Path) -> None:
        # not into a memory map: on a full disk that kills the process
        with open(beside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in _bar(range(len(examples)), cache.name):
                example = examples[i]
                file.write(example["image"].tobytes())
                found[i] = example["label"]

    files.write(images, write)
    files.write(labels, lambda beside: np.save(beside, found))


def _of_examples(examples: Sequence[dict]) -> Columns:
    """Columns whose rows are decoded when they are asked for."""
    last = np.empty(0, int), np.empty(0), np.empty(0)

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal last
        # labels are asked for when images of the same rows just were, and come with them
        if not np.array_equal(rows, last[0]):
            found = [examples[int(i)] for i in _bar(rows, "reading")]
            images = np.stack([example["image"] for example in found])
            last = rows, images, np.array([example["label"] for example in found], np.int32)
        return last[1:]

    rows, first = range(len(examples)), examples[0]["image"]
    return Columns(
        Column(lambda i: read(i)[0], rows, first.shape, first.dtype),
        Column(lambda i: read(i)[1], rows, (), np.dtype(np.int32)),
    )


def _bar(what: Sequence, name: str) -> Any:
    # decoding takes 0.3 ms an image; a batch is there before one would look
    return tqdm(what, desc=name, disable=None, leave=False, delay=1)
