"""Runs a flax module with arrays smaller than its arguments say, as `flj.compact` makes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn


@contextmanager
def sizes_of_params() -> Iterator[None]:
    """Lets dense and convolution layers take their number of outputs from their kernels.

    Within it a module may be applied to parameters of other sizes; other layers, such as batch
    norm, take their sizes from what they are given anyway.
    """
    with nn.intercept_methods(_resized):
        yield


def _resized(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    layer = context.module
    sized = isinstance(layer, (nn.Dense, nn.Conv)) and context.method_name == "__call__"
    if sized and layer.has_variable("params", "kernel"):
        # flax freezes the fields of a module; this object lives for one application only
        object.__setattr__(layer, "features", layer.get_variable("params", "kernel").shape[-1])
    return call(*args, **kwargs)
