"""Value that `compact` returns."""

from typing import Any, NamedTuple

import numpy as np

from fishleg_jax import _text
from fishleg_jax.compaction.report import CompactReport
from fishleg_jax.compaction.slicing import Slicer


class Kept(NamedTuple):
    """Units of one coupling that stay.

    Attributes:
        coupling: List of `(key path, axis)` or `(key path, axis, block size)`.
        indices: Units that stay, in their order; shape (units,), int.
        units: Number of units before.
    """

    coupling: list[tuple]
    indices: np.ndarray
    units: int

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Compact(NamedTuple):
    """Smaller network, as `compact` returns it.

    Attributes:
        params: Smaller parameters, in their dtypes.
        constants: Smaller constants; None without.
        masks: Masks of the smaller parameters.
        kept: Units that stay, for every coupling.
        report: Numbers before and after; print it.
        slicer: Indices that stay, and the shapes before; used by `like` and `opt_state`.
    """

    params: Any
    constants: Any | None
    masks: Any
    kept: tuple[Kept, ...]
    report: CompactReport
    slicer: Slicer

    def __repr__(self) -> str:
        """One line, without the arrays."""
        return f"Compact({self.report.summary()})"

    def like(self, tree: Any) -> Any:
        """Cuts a pytree like the parameters before, such as gradients, scores or averages.

        Args:
            tree: Pytree of arrays with the structure and shapes of the parameters before.

        Returns:
            The tree with the shapes of the smaller parameters.

        Raises:
            ValueError: Other key paths or shapes.
        """
        return self.slicer.like(tree)

    def opt_state(self, state: Any) -> Any:
        """Cuts the state of an optimiser, so that training goes on.

        Args:
            state: State of an optimiser of optax for the parameters before; of gradual pruning
                only what `flj.prune` has in `inner`.

        Returns:
            The state for the smaller parameters.

        Raises:
            ValueError: The state of a gradual pruning, or a leaf that is like no single parameter,
                such as a preconditioner or a factored moment.
        """
        return self.slicer.state(state)
