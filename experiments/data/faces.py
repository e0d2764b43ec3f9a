"""The Olivetti faces as 25x25 images, rotated, enlarged and cropped as in Hinton & Salakhutdinov.

Reducing the dimensionality of data with neural networks, Science 2006, supporting material: angles
from -90 to 90 degrees, scales from 1.4 to 1.8, ten people whom training never sees, every pixel
shifted to mean zero, and one number that makes the average variance of a pixel 1.
"""

from pathlib import Path

import numpy as np

FILE = "data/olivettifaces.mat"
SIDE, PEOPLE, EACH = 25, 40, 10  # pixels, and images of each person
TEST_PEOPLE = 10
COPIES = 40, 20  # of each image in training, of 345 in the paper, and for testing


def read(path: Path) -> np.ndarray:
    """The 400 faces, `(400, 64, 64)` in [0, 1], ten after ten of each person.

    Args:
        path: `olivettifaces.mat`.

    Raises:
        ValueError: it is something else.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        faces = loadmat(path)["faces"]
    except (OSError, ValueError, KeyError, TypeError, MatReadError) as error:
        raise ValueError(f"{path} has no faces: {error}") from error
    if faces.shape != (64 * 64, PEOPLE * EACH):
        raise ValueError(f"{path} has faces of shape {faces.shape}, expected (4096, 400)")
    # a column is an image, column by column
    return faces.T.reshape(-1, 64, 64).swapaxes(1, 2).astype(np.float32) / 255


def cropped(faces: np.ndarray, copies: int, rng: np.random.Generator) -> np.ndarray:
    """Random views of every face.

    Args:
        faces: `(faces, height, width)`.
        copies: number of views of each.
        rng: chooses angles and scales.

    Returns:
        `(faces · copies, 25, 25)`.
    """
    from scipy.ndimage import map_coordinates

    size = faces.shape[1]
    angle = np.radians(rng.uniform(-90, 90, (len(faces), copies)))
    # at 1.4 a view that is turned by 45 degrees just fits into the image
    step = size / SIDE / rng.uniform(1.4, 1.8, (len(faces), copies))
    offsets = np.arange(SIDE) - (SIDE - 1) / 2
    down, right = np.meshgrid(offsets, offsets, indexing="ij")
    cos, sin = (f(angle)[..., None, None] * step[..., None, None] for f in (np.cos, np.sin))
    middle = (size - 1) / 2
    rows, columns = middle + cos * down - sin * right, middle + sin * down + cos * right
    which = np.broadcast_to(np.arange(len(faces))[:, None, None, None], rows.shape)
    views = map_coordinates(faces, (which, rows, columns), order=1, mode="nearest")
    return views.reshape(-1, SIDE, SIDE)


def load(path: Path, copies: tuple[int, int] = COPIES) -> tuple[tuple, tuple]:
    """Training and test images with themselves as targets; always the same ones.

    Args:
        path: `olivettifaces.mat`.
        copies: number of views of a face, for training and for testing.

    Returns:
        Twice images `(examples, 25, 25, 1)` and targets `(examples, 625)`: of the first thirty
        people, and of the last ten.
    """
    people = read(path).reshape(PEOPLE, EACH, 64, 64)
    parts = people[:-TEST_PEOPLE], people[-TEST_PEOPLE:]
    rng = np.random.default_rng(0)
    train, test = (
        cropped(part.reshape(-1, 64, 64), n, rng) for part, n in zip(parts, copies, strict=True)
    )
    mean = train.mean(axis=0)
    scale = (train - mean).std(axis=0, dtype=np.float64)
    scale = np.float32(np.sqrt((scale**2).mean()))
    scaled = [((part - mean) / scale).astype(np.float32) for part in (train, test)]
    return tuple((part[..., None], part.reshape(len(part), -1)) for part in scaled)
