"""Other sizes of the inputs: a smaller network has to be the same function there as well.

The constant that a removed unit leaves behind a sum over positions, or a loop over time, is another
one for other lengths, and behind a convolution with strides for sizes that are padded.  So the
network is analysed again with its inputs a little shorter and at half of their size, wherever it
runs on that, and, where a loop gets longer with them, twice as long.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fishleg_jax._jaxpr import functions, opened
from fishleg_jax.compaction.analysis import Analysis, Network

SHORTER = (1, 2, 4, 8)  # odd sizes, also behind strides


def other_runs(
    network: Network, inputs: Any, analysed: Callable[[Any], Analysis], folded: bool
) -> Iterator[tuple[Any, Analysis, bool]]:
    """Yields inputs of other sizes, with the analysis of a run on them.

    Args:
        network: The network.
        inputs: Inputs with a leading axis of examples.
        analysed: Function from inputs to an analysis.
        folded: Whether constants depend on the size, so that shorter inputs count as well.

    Yields:
        Inputs, an analysis, and whether loops take longer than on the inputs given.
    """
    steps = _steps(network, inputs)
    for size, axes, shorter in _lengths(network, inputs):
        loops = _steps(network, shorter[-1]) != steps
        if folded:
            for other in (shorter[0], shorter[-1]) if loops else shorter:
                yield other, analysed(other), False
        longer = _resized(inputs, size, axes, 2 * size)
        if loops and _runs(network, longer):
            yield longer, analysed(longer), True


def _shorter(size: int) -> list[int]:
    """Smaller sizes to try, the largest first."""
    return sorted({*(size - n for n in SHORTER if n < size), size // 2}, reverse=True)


def _lengths(network: Network, inputs: Any) -> Iterator[tuple[int, Sequence[int], list[Any]]]:
    """Yields sizes that `f` also takes smaller, the axes that have them, and smaller inputs."""
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    for size in sorted({n for shape in shapes for n in shape[1:] if n > 1}):
        axes = sorted({i for shape in shapes for i, n in enumerate(shape) if i and n == size})
        # all at once, as height and width; else one by one, as positions beside features
        for chosen in dict.fromkeys([tuple(axes), *((i,) for i in axes)]):
            smaller = (_resized(inputs, size, chosen, n) for n in _shorter(size))
            running = [x for x in smaller if _runs(network, x)]
            if running:
                yield size, chosen, running
                break


def _steps(network: Network, inputs: Any) -> int:
    """Number of operations of a network, those of loops counted in every round."""

    def count(jaxpr: Any) -> int:
        return sum(
            1
            + equation.params.get("length", 1) * sum(count(opened(x)) for x in functions(equation))
            for equation in jaxpr.eqns
        )

    return count(jax.make_jaxpr(network.call)(network.leaves(), inputs).jaxpr)


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
