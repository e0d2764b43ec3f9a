"""The table of methods: the estimate of each, its settings and its share of the data."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import fishleg_jax as flj

GRADIENTS = 1000  # that woodfisher and mfac make of the images, or one of each if there are fewer
AT_ONCE = 100  # gradients that are in memory at a time
CHUNK = "examples_per_chunk"  # bounds the memory of every estimate that looks at data


class Method(NamedTuple):
    """How the estimate of a method is made.

    Attributes:
        make: its constructor, `(model, **settings) -> InverseFisher`.
        takes: those settings that a user may choose.
        fixed: settings that define the method.
    """

    make: Callable[..., flj.InverseFisher]
    takes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = {}


_OF_ALL = ("damping", "labels")
_OF_MEANS = (*_OF_ALL, "block_size", "examples_per_gradient")

METHODS = {
    "magnitude": Method(lambda model: flj.inverse.identity()),
    "diagonal": Method(flj.inverse.diagonal, _OF_ALL),
    "kfac": Method(flj.inverse.kfac, _OF_ALL),
    "woodfisher": Method(flj.inverse.woodfisher, (*_OF_MEANS, "gradients")),
    "mfac": Method(flj.inverse.mfac, (*_OF_MEANS, "window")),
    "fishleg": Method(flj.inverse.fishleg, ("damping", "updates")),
    "fishleg_start": Method(flj.inverse.fishleg, ("damping",), {"learn": False}),
}


def variant(method: str, **settings: Any) -> Callable[..., flj.InverseFisher]:
    """A method's constructor with settings other than the library's defaults.

    Args:
        method: a name in `METHODS`.
        **settings: arguments of the constructor, whether or not a user may choose them.

    Returns:
        The function `(model, **further settings) -> InverseFisher`.
    """
    chosen = METHODS[method]
    return partial(chosen.make, **{**chosen.fixed, **settings})


class Share(NamedTuple):
    """How training images are divided among gradients.

    Attributes:
        examples: the images, the same number of them for every gradient.
        gradients: number of gradients that woodfisher and mfac make of them.
    """

    examples: int
    gradients: int

    @property
    def each(self) -> int:
        """How many images a gradient is the mean of."""
        return self.examples // self.gradients

    @property
    def settings(self) -> dict[str, int]:
        """Settings of woodfisher and mfac that follow from it."""
        return {
            "gradients": self.gradients,
            "window": self.gradients,
            "examples_per_gradient": self.each,
        }


def share(examples: int, gradients: int | None = None) -> Share:
    """Divides images among gradients.

    Args:
        examples: number of images; a remainder is left out.
        gradients: number of gradients; None for 1000, or one for each image if there are fewer.

    Returns:
        The numbers that are used.

    Raises:
        ValueError: there are fewer images than gradients.
    """
    gradients = min(GRADIENTS, examples) if gradients is None else gradients
    if gradients > examples:
        raise ValueError(f"--gradients {gradients}: there are only {examples} images to make them")
    return Share(examples // gradients * gradients, gradients)


def half(part: Share) -> Share:
    """Half of the images, or a little less, in gradients that fill equal batches."""
    gradients = part.gradients // 2
    batches = -(-gradients // AT_ONCE)
    gradients = gradients // batches * batches
    return Share(part.each * gradients, gradients)


def batch_size(method: str, part: Share, usual: int) -> int:
    """How many images a batch has in which a method sees them.

    Args:
        method: a name in `METHODS`.
        part: how the images are divided.
        usual: the model's usual batch, for the methods that are fitted to whole batches.
    """
    takes = METHODS[method].takes
    if "examples_per_gradient" in takes:
        return part.each * _even(part.gradients, AT_ONCE)
    return _even(part.examples, AT_ONCE if "labels" in takes else usual)


def _even(total: int, most: int) -> int:
    # all batches of one size compile once; where that would make them tiny the last one is smaller
    most = min(total, most)
    divisor = next(size for size in range(most, 0, -1) if total % size == 0)
    return divisor if 2 * divisor >= most else most


def settings_of(method: str, **given: Any) -> dict[str, Any]:
    """The settings that an estimate is made with.

    Args:
        method: a name in `METHODS`.
        **given: settings by name; None for the library's default, and those that the method does
            not know are left out.

    Returns:
        All settings of the method that a user may choose, and those that are fixed;
        `examples_per_chunk`, which changes no result, only where it is given.
    """
    chosen = METHODS[method]
    known = inspect.signature(chosen.make).parameters
    settings = {
        name: known[name].default if given.get(name) is None else given[name]
        for name in chosen.takes
    }
    if CHUNK in known and given.get(CHUNK) is not None:
        settings[CHUNK] = given[CHUNK]
    return settings | chosen.fixed


def make_estimator(method: str, model: flj.Model, **given: Any) -> flj.InverseFisher:
    """The inverse Fisher of a method, with the settings that a user gave.

    Args:
        method: a name in `METHODS`; `fishleg_start` is FishLeg's closed-form start, with nothing
            learned, and `magnitude` the identity.
        model: the model.
        **given: see `settings_of`.
    """
    return METHODS[method].make(model, **settings_of(method, **given))
