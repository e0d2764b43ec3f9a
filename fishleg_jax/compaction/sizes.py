"""Other sizes of the inputs: a smaller network has to be the same function there as well.

The constant that a removed unit leaves behind a sum over positions, or a loop over time, is another
one for other lengths.  So the network is analysed again with each size of its inputs halved, where
it runs on that, and, where a loop gets longer with it, doubled.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fishleg_jax.compaction.analysis import Analysis, Network


def other_runs(
    network: Network, analysis: Analysis, inputs: Any, analysed: Callable[[Any], Analysis]
) -> Iterator[tuple[Any, Analysis, bool]]:
    """Yields inputs of other sizes, with the analysis of a run on them.

    Args:
        network: The network.
        analysis: Its analysis on `inputs`.
        inputs: Inputs with a leading axis of examples.
        analysed: Function from inputs to an analysis.

    Yields:
        Inputs, an analysis, and whether loops take longer than on the inputs given.
    """
    for size, axes in _lengths(network, inputs):
        shorter = analysed(_resized(inputs, size, axes, size // 2))
        yield _resized(inputs, size, axes, size // 2), shorter, False
        longer = _resized(inputs, size, axes, 2 * size)
        if len(shorter.tape.steps) != len(analysis.tape.steps) and _runs(network, longer):
            yield longer, analysed(longer), True


def _lengths(network: Network, inputs: Any) -> Iterator[tuple[int, Sequence[int]]]:
    """Yields sizes of the inputs that `f` also takes halved, with the axes that have them."""
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    for size in sorted({n for shape in shapes for n in shape[1:] if n > 1}):
        axes = sorted({i for shape in shapes for i, n in enumerate(shape) if i and n == size})
        # all at once, as height and width; else one by one, as positions beside features
        for chosen in dict.fromkeys([tuple(axes), *((i,) for i in axes)]):
            if _runs(network, _resized(inputs, size, chosen, size // 2)):
                yield size, chosen
                break


def _resized(inputs: Any, size: int, axes: Sequence[int], wanted: int) -> Any:
    """Inputs in which axes of one size have another: cut or repeated."""

    def changed(x: Any) -> Any:
        for axis in axes:
            if axis < np.ndim(x) and np.shape(x)[axis] == size:
                x = np.take(x, np.arange(wanted) % size, axis=axis)
        return x

    return jax.tree.map(changed, inputs)


def _runs(network: Network, inputs: Any) -> bool:
    try:
        jax.eval_shape(network.call, network.leaves(), inputs)
    except Exception:  # whatever a user's function raises on inputs of another size
        return False
    return True
