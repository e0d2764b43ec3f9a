"""CURVES: grey images of cubic Bézier strokes, after Hinton & Salakhutdinov (Science 2006).

A stroke runs from end to end through a third random point: six numbers, as many as the auto-encoder
of the papers has units in its code.  Both inner control points lie in one place for that.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.running import files

SIDE, EXAMPLES, TEST = 28, 20_000, 10_000
MARGIN = 3.0  # pixels between the three points and the border
BRUSH = 0.8  # pixels, the standard deviation of the brush
SAMPLES = 128  # points of a stroke, mostly less than a pixel apart
CHUNK = 1000  # strokes drawn at once: their brushes take 29 MB


def strokes(points: np.ndarray) -> np.ndarray:
    """Draws strokes with a Gaussian brush.

    The ink of a pixel is the integral of the brush along the stroke, scaled to 1 on a straight line
    and cut off there, so that it depends on the shape of a stroke and not on its speed.

    Args:
        points: `(strokes, 3, 2)`, begin, middle and end of each, in pixels from the middle of the
            first pixel.

    Returns:
        Images `(strokes, 28, 28)` in [0, 1], float32.
    """
    t = (np.arange(SAMPLES) + 0.5)[:, None] / SAMPLES
    # cubic, with equal inner control points, placed so that the middle is reached at t = 1/2
    begin, middle, end = np.moveaxis(points, 1, 0)
    control = (middle - (begin + end) / 8) / 0.75
    controls = np.stack([begin, control, end], axis=1)
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t), t**3], axis=1)
    slopes = np.concatenate([-3 * (1 - t) ** 2, 3 - 6 * t, 3 * t**2], axis=1)
    places, speeds = weights @ controls, slopes @ controls
    lengths = np.linalg.norm(speeds, axis=-1) / SAMPLES
    # a Gaussian brush is a product of two, so that the integral is a matrix product
    distances = places.astype(np.float32)[..., None] - np.arange(SIDE, dtype=np.float32)
    brush = np.exp(-0.5 * (distances / np.float32(BRUSH)) ** 2)
    down, right = brush[:, :, 0], brush[:, :, 1]
    ink = (lengths / (BRUSH * np.sqrt(2 * np.pi))).astype(np.float32)
    return np.minimum(np.swapaxes(ink[..., None] * down, 1, 2) @ right, 1)


def draw(count: int, seed: int = 0) -> np.ndarray:
    """Draws random strokes, the same ones for the same seed.

    Args:
        count: number of images; more of them begin with the same ones.
        seed: of the points, uniform in the image without its margin.

    Returns:
        Images `(count, 28, 28)` as uint8, as other data sets are stored.
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform(MARGIN, SIDE - 1 - MARGIN, (count, 3, 2))
    images = np.empty((count, SIDE, SIDE), np.uint8)
    for rows in _chunks(count):
        images[rows] = np.rint(255 * strokes(points[rows]))
    return images


def load(
    cache: Path | None = None, examples: int = EXAMPLES, test: int = TEST
) -> tuple[tuple, tuple]:
    """Training and test images with themselves as targets.

    Args:
        cache: an npy file that keeps the images; it is written where it is missing or has another
            number of images. None to draw them anew, which takes seconds.
        examples: number of training images.
        test: number of test images.

    Returns:
        Twice images `(examples, 28, 28, 1)` in [0, 1] and targets `(examples, 784)`, float32.

    Raises:
        ValueError: the file has something else.
    """
    images = _cached(cache, examples + test)
    parts = (images[:examples], images[examples:])
    scaled = [part.astype(np.float32) / 255 for part in parts]
    return tuple((part[..., None], part.reshape(len(part), -1)) for part in scaled)


def _cached(cache: Path | None, count: int) -> np.ndarray:
    shape = (count, SIDE, SIDE)
    if cache is not None and cache.exists():
        try:
            images = np.load(cache)
        except (OSError, ValueError) as error:
            raise ValueError(f"{cache} has no curves: {error}") from error
        if images.shape == shape and images.dtype == np.uint8:
            return images
    images = draw(count)
    if cache is not None:
        files.write(cache, lambda beside: np.save(beside, images))
    return images


def _chunks(count: int) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK) for begin in range(0, count, CHUNK))
