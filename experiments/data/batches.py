"""The order of training examples: a function of the seed and the step, so that a run can go on."""

from functools import lru_cache

import numpy as np

from experiments.data import datasets
from experiments.running import processes


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def rows(seed: int, step: int, examples: int, batch: int) -> np.ndarray:
    """The examples of a step; every epoch has its own order, and a remainder is left out.

    Args:
        seed: of the order.
        step: the number of the step, from 0.
        examples: number of examples in all.
        batch: examples in a step, at most that number.
    """
    epoch, place = divmod(step, examples // batch)
    return _permutation(seed, epoch, examples)[place * batch : (place + 1) * batch]


def batch_at(
    name: str, train: datasets.Arrays, *, seed: int, step: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and targets that a step sees, shifted and flipped where the data set wants it.

    Args:
        name: of the data set.
        train: its training part.
        seed: of the order, the shifts and the flips.
        step: the number of the step, from 0.
        batch: number of examples.
    """
    own = processes.share(batch)
    chosen = rows(seed, step, len(train[0]), batch)[own]
    rng = np.random.default_rng([seed, step, 1])
    images = datasets.augmented(name, train[0][chosen], rng, (batch, own))
    return (
        processes.joint((images, train[1][chosen]))
        if processes.several()
        else (images, train[1][chosen])
    )
