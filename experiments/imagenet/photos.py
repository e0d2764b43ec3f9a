"""Photos of ImageNet: from a tar of JPEGs, or from a prepared TensorFlow data set."""

import io
import tarfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import datasets
from experiments.running import files

CLASSES = 1000
TARS = {
    "calibration": "data/imagenet/calibration.tar",
    "validation": "data/imagenet/validation.tar",
}
# of a photo from TFDS the shorter side is scaled to this before the crop, as is usual
SHORTER_SIDE = 256
KEPT = 4096  # decoded photos of a tar or a split, 0.6 GB


class Photos:
    """Photos, decoded when they are asked for; the last few thousand are kept.

    So of several processes each reads and holds those of its share, and of a large data set no one
    holds all.
    """

    def __init__(self, decode: Callable[[int], tuple[np.ndarray, int]], rows: Sequence[int]):
        """Makes them of a function that decodes one.

        Args:
            decode: from a row of where they are to `(size, size, 3)` uint8, RGB, and the label, in
                [0, 1000).
            rows: which of the photos there these are.
        """
        self._decode, self._rows = decode, list(rows)

    def __len__(self) -> int:
        """Number of photos."""
        return len(self._rows)

    def part(self, rows: Sequence[int]) -> "Photos":
        """Some of them, in this order."""
        return Photos(self._decode, [self._rows[i] for i in rows])

    def read(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Some of them decoded.

        Args:
            rows: which ones.

        Returns:
            `(photos, size, size, 3)`, uint8, RGB, and their labels, int32.

        Raises:
            ValueError: one can't be decoded, which is named.
        """
        pixels, labels = zip(*(self._decode(self._rows[i]) for i in rows), strict=True)
        return np.stack(pixels), np.array(labels, np.int32)


class Source(NamedTuple):
    """Where photos are from.

    Attributes:
        name: in a word, for results.
        calibration: photos for the curvature, the damping and the statistics of batch norm.
        validation: photos to evaluate on, and for nothing else.
    """

    name: str
    calibration: Photos
    validation: Photos


def load(data_dir: Path | None, *, calibration: int, validation: int | None, size: int) -> Source:
    """Finds photos; they are read when they are needed.

    Args:
        data_dir: a folder in which TensorFlow Datasets has `imagenet2012`; None for the two tars of
            the shared folder.
        calibration: number of photos to calibrate on, spread evenly over the tar, which is in the
            order of classes, or over the training part of the data set.
        validation: number of photos to evaluate on, chosen likewise; None for all.
        size: pixels of the square that is cut out of their centre.

    Raises:
        ValueError: they are missing, or there are fewer.
    """
    wanted = {"calibration": calibration, "validation": validation}
    if data_dir is None:
        paths = {part: files.shared(name) for part, name in TARS.items()}
        return Source("tar", *(read_tar(paths[part], wanted[part], size) for part in TARS))
    folder = prepared(data_dir)
    splits = {"calibration": "train", "validation": "validation"}
    return Source(
        "tfds", *(read_tfds(folder, split, wanted[part], size) for part, split in splits.items())
    )


def crop(image, size: int) -> np.ndarray:
    """The square in the centre of an image of PIL, as uint8 RGB; a smaller image is scaled up."""
    shorter = min(image.size)
    if shorter < size:
        image = scaled(image, size)
    left, top = ((side - size) // 2 for side in image.size)
    box = (left, top, left + size, top + size)
    return np.asarray(image.convert("RGB").crop(box))


def scaled(image, shorter: int):
    """PIL image scaled to a given length of its shorter side, in pixels."""
    factor = shorter / min(image.size)
    return image.resize([max(round(side * factor), shorter) for side in image.size])


def read_tar(path: Path, number: int | None, size: int) -> Photos:
    """Photos of a tar, spread evenly over the order of their names, `<index>_<label>.jpg`.

    Args:
        path: the tar, not compressed.
        number: number of photos; None for all.
        size: pixels of the square that is cut out of their centre.

    Raises:
        ValueError: it is no such tar, or has fewer photos.
    """
    from PIL import Image

    try:
        with tarfile.open(path, "r:") as tar:
            members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} can't be read as a tar of photos: {error}") from error
    labels = [_label(member.name, path) for member in members]

    @lru_cache(KEPT)
    def decode(row: int) -> tuple[np.ndarray, int]:
        member = members[row]
        try:
            with open(path, "rb") as file:
                file.seek(member.offset_data)
                return crop(Image.open(io.BytesIO(file.read(member.size))), size), labels[row]
        except OSError as error:
            raise ValueError(f"{path} has {member.name}, which is not a photo: {error}") from error

    return Photos(decode, _spread(len(members), number, path))


def _label(name: str, path: Path) -> int:
    text = Path(name).stem.rpartition("_")[2]
    if not text.isdecimal() or int(text) >= CLASSES:
        raise ValueError(f"{path} has {name}, expected <index>_<label>.jpg, labels below {CLASSES}")
    return int(text)


def _spread(available: int, number: int | None, where: Path) -> list[int]:
    wanted = available if number is None else number
    if not 0 < wanted <= available:
        raise ValueError(f"{wanted} photos are wanted, and {where} has {available}")
    return [i * available // wanted for i in range(wanted)]


def prepared(data_dir: Path) -> Path:
    """The folder of `imagenet2012` in a folder of TensorFlow Datasets, see `datasets.prepared`.

    Raises:
        ValueError: it is not there; ImageNet is downloaded by hand, as it says.
    """
    return datasets.prepared("imagenet2012", data_dir, splits=("train", "validation"))


def read_tfds(folder: Path, split: str, number: int | None, size: int) -> Photos:
    """Photos of a prepared data set, spread evenly over a split.

    Args:
        folder: see `prepared`.
        split: `train` or `validation`.
        number: number of photos; None for all.
        size: pixels of the square that is cut out of their centre, once their shorter side has 256.

    Raises:
        ValueError: there are fewer.
    """
    from PIL import Image

    source = datasets.source(folder, split)

    @lru_cache(KEPT)
    def decode(row: int) -> tuple[np.ndarray, int]:
        item = source[row]
        image = scaled(Image.fromarray(item["image"]), max(SHORTER_SIDE, size))
        return crop(image, size), int(item["label"])

    return Photos(decode, _spread(len(source), number, folder))
