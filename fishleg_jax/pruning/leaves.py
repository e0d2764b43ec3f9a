"""Leaves of the weights that a pruning works on."""

from typing import Any, NamedTuple

from fishleg_jax import _prunable, _tree


class Leaves(NamedTuple):
    """Leaves of the weights that are pruned, adjusted or stacked; given as `prunable=`.

    Attributes:
        prunable: Leaves that may be pruned: regular expressions over key paths; a mapping of these
            to True or False, where the first match decides; a pytree of booleans like the weights,
            or a prefix of it; or a predicate `(name, leaf) -> bool`.  None for the default: all but
            vectors and leaves with the name of a bias, a normalisation's parameter, an embedding or
            a position.
        adjustable: Leaves that a compensation may move, given like `prunable`; None for all.  The
            estimate is then fitted to these and the prunable leaves, and weights elsewhere stay as
            they are, bit for bit.  For a frozen backbone name the leaves that are trained.
        stacked: Leaves with a leading axis of layers, as `lax.scan` over layers needs, by regular
            expressions or a predicate: with `scope="layer"` each layer has its own threshold.  A
            leaf of two dimensions is then a stack of vectors, which are not prunable by default.
            The estimators `kfac` and `fishleg` take the same argument for their factors.
        costs: Cost of each weight in one-shot pruning, a pytree of positive numbers or arrays such
            as `weight_costs` returns: scores are divided by it, so that of two equal scores the
            dearer weight goes first; with a pattern the score of a group by the sum of its costs.
            None for equal costs.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.Leaves("kernel", adjustable="head").adjustable
        'head'
    """

    prunable: _prunable.LeafSelection = None
    adjustable: _prunable.LeafSelection = None
    stacked: _tree.Stacked = None
    costs: Any | None = None


def leaves_of(prunable: "_prunable.LeafSelection | Leaves") -> Leaves:
    """Converts the argument `prunable` of a pruning to `Leaves`."""
    return prunable if isinstance(prunable, Leaves) else Leaves(prunable)
