"""The data sets: real ones, read once into arrays, or by several processes row by row."""

import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import columns, curves, faces
from experiments.running import files, processes

DIGITS_TEST = 500
CONTEXT = 64
SHIFT = 4  # pixels by which an image may be shifted in training
SHARED = {"tinyshakespeare": "data/tinyshakespeare.txt", "faces": faces.FILE}
# name -> mean and scale by which pixels in [0, 1] are normalised
NORMALISATION = {"mnist": (0.1307, 0.3081), "cifar10": (0.5, 0.5), "mnist_raw": (0.0, 1.0)}
Array = np.ndarray | columns.Column
Arrays = tuple[Array, Array]


class Data(NamedTuple):
    """A data set.

    Attributes:
        train: inputs and targets to train on, and to estimate curvature from.
        test: inputs and targets to evaluate on, and for nothing else.
    """

    train: Arrays
    test: Arrays


def digits() -> Data:
    """The 1,797 hand-written digits that scikit-learn bundles.

    Returns:
        Images `(examples, 8, 8, 1)` in [0, 1] and labels; 500 of them for testing, stratified, and
        always the same ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels.astype(np.int32), test_size=DIGITS_TEST, stratify=labels, random_state=0
    )
    return Data((x_train, y_train), (x_test, y_test))


def prepared(
    name: str, data_dir: str | Path | None = None, splits: Sequence[str] = ("train", "test")
) -> Path:
    """The folder of a data set that TensorFlow Datasets has prepared in the array_record format.

    Args:
        name: `mnist`, `cifar10` or `imagenet2012`.
        data_dir: the folder of the data sets; None for `TFDS_DATA_DIR`, else
            `~/.cache/fishleg-data` where that has the data set, else `~/tensorflow_datasets`.
        splits: the splits that must be there.

    Returns:
        `data_dir/name/version`.

    Raises:
        ValueError: it is not there.  (TensorFlow Datasets would try to download for minutes.)
    """
    if data_dir is None:
        cache = Path("~/.cache/fishleg-data").expanduser()
        usual = cache if (cache / name).is_dir() else Path("~/tensorflow_datasets").expanduser()
        data_dir = os.environ.get("TFDS_DATA_DIR", usual)
    versions = [
        info.parent
        for info in sorted(Path(data_dir).expanduser().glob(f"{name}/*/dataset_info.json"))
        if all(any(info.parent.glob(f"{name}-{s}.array_record-*")) for s in splits)
    ]
    if not versions:
        raise ValueError(
            f"--data-dir {data_dir} has no {name} prepared as array_record; make it with tfds: "
            'python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
            '.download_and_prepare()"'
        )
    return versions[-1]


def source(folder: Path, split: str) -> Any:
    """The examples of a prepared data set, decoded as they are asked for: a sequence of dicts.

    Args:
        folder: see `prepared`.
        split: the name of a split.

    Raises:
        ValueError: tensorflow-datasets is not installed.
    """
    name = folder.parent.name
    logging.getLogger("absl").setLevel(logging.ERROR)  # it advises to install OpenCV
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f'{name} is read with tensorflow-datasets ({error}): pip install -e ".[experiments]"'
        ) from error
    return tfds.data_source(
        f"{name}:{folder.name}", split=split, data_dir=folder.parents[1], download=False
    )


def tinyshakespeare(path: Path) -> Data:
    """A text cut into windows of characters, whose targets are the characters that follow.

    Args:
        path: a text file.

    Returns:
        Characters as integers `(windows, 64)`, numbered in the order of their code points, and as
        targets the same shifted by one; the last tenth of the text is for testing.
    """
    text = np.frombuffer(path.read_bytes(), np.uint8)
    tokens = np.unique(text, return_inverse=True)[1].astype(np.int32)
    windows = (len(tokens) - 1) // CONTEXT
    inputs = tokens[: windows * CONTEXT].reshape(windows, CONTEXT)
    targets = tokens[1 : windows * CONTEXT + 1].reshape(windows, CONTEXT)
    train = windows - windows // 10
    return Data((inputs[:train], targets[:train]), (inputs[train:], targets[train:]))


def check(name: str, data_dir: str | Path | None = None) -> None:
    """Finds out, without reading it, whether `load` has a data set.

    Args:
        name: see `load`.
        data_dir: see `prepared`.

    Raises:
        ValueError: it is missing.
    """
    if name in SHARED:
        files.shared(SHARED[name])
    elif name not in ("digits", "curves"):
        prepared(name.removesuffix("_raw"), data_dir)


def load(name: str, data_dir: str | Path | None = None) -> Data:
    """A data set as arrays.

    Where there are several processes, one of TensorFlow Datasets comes as columns, of which each
    process reads only the rows that it asks for; the others are small.

    Args:
        name: `digits`, `mnist`, `cifar10`, `tinyshakespeare`, or `mnist_raw`, whose pixels stay in
            [0, 1] and whose targets are the pixels, or `faces` or `curves`, see the modules of
            these names in `experiments.data`.
        data_dir: where TensorFlow Datasets has its data, see `prepared`.

    Returns:
        Images as float32, channels last, and labels as int32.

    Raises:
        ValueError: the data or the package that reads them are missing.
    """
    if name == "digits":
        return digits()
    if name == "tinyshakespeare":
        return tinyshakespeare(files.shared(SHARED[name]))
    if name == "faces":
        return Data(*faces.load(files.shared(SHARED[name])))
    if name == "curves":
        return Data(*curves.load())
    stored = name.removesuffix("_raw")
    folder = prepared(stored, data_dir)
    mean, scale = np.float32(NORMALISATION[name])
    splits = []
    for split in ("train", "test"):
        # decoding takes 0.3 ms an image, so the decoded ones are kept beside the data set
        cache = folder.parents[1] / f"{stored}-{folder.name}-{split}"
        images, targets = columns.split(cache, partial(source, folder, split))
        images = images.then(lambda rows: (rows.astype(np.float32) / 255 - mean) / scale)
        if name == "mnist_raw":
            pixels = math.prod(images.row_shape)
            targets = images.then(lambda rows: rows.reshape(len(rows), -1), (pixels,))
        if not processes.several():
            images, targets = images.whole(), targets.whole()
        splits.append((images, targets))
    return Data(*splits)


def augmented(
    name: str,
    images: np.ndarray,
    rng: np.random.Generator,
    part: tuple[int, slice] | None = None,
) -> np.ndarray:
    """Images as networks for CIFAR-10 see them in training: shifted by up to 4 pixels, and flipped.

    The statistics of the checkpoint's batch norm are those of such images: on plain ones, without
    the black borders, they are others.

    Args:
        name: the name of the data set; what is not `cifar10` stays as it is.
        images: `(examples, height, width, channels)`, as `load` makes them.
        rng: chooses the shifts and which images are flipped.
        part: of how many images these are which, that a share of a batch is treated as in it.
    """
    if name != "cifar10":
        return images
    mean, scale = np.float32(NORMALISATION[name])
    total, own = (len(images), slice(None)) if part is None else part
    count, height, width, _ = images.shape
    edges = [(0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)]
    # zero is black once the mean is added
    padded = np.pad(images * scale + mean, edges)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    top, left = rng.integers(0, 2 * SHIFT + 1, (2, total))[:, own]
    chosen = np.moveaxis(windows[np.arange(count), top, left], 1, -1)
    flipped = rng.random(total)[own] < 0.5
    chosen = np.where(flipped[:, None, None, None], chosen[:, :, ::-1], chosen)
    return (chosen - mean) / scale
