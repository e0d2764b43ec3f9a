"""Leaves that are pruned, and weights that share a threshold: decided once, and carried.

A group is a list of leaves that are ranked together.  Weights of one group share a threshold,
except that a group of one stacked leaf (L layers along its leading axis) has one for each layer.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _prunable, _text, _tree
from fishleg_jax._devices import placement
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._tiles import covered
from fishleg_jax.pruning.masks import densities as _densities
from fishleg_jax.pruning.masks import layout as _layout
from fishleg_jax.pruning.masks.densities import Scope, check_scope
from fishleg_jax.pruning.masks.patterns import Pattern, check_pattern


class Groups(NamedTuple):
    """Leaves of one tree that are pruned, and how they are ranked; hashable, without arrays.

    Attributes:
        names: Key path of every leaf, in the tree's order.
        shapes: Shape of every leaf.
        reasons: Reason for leaving out each leaf; None if it is pruned.
        stacked: Whether each leaf's leading axis is one of layers.
        scope: `global`, `layer`, `erk`, or `densities` for those given by name.
        pattern: Weights that live or die together; None for single weights.
        densities: Fraction of each leaf to keep, given by name; None otherwise.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    reasons: tuple[str | None, ...]
    stacked: tuple[bool, ...]
    scope: str
    pattern: Pattern | None = None
    densities: tuple[float, ...] | None = None

    @property
    def chosen(self) -> list[bool]:
        """Whether each leaf is pruned."""
        return [reason is None for reason in self.reasons]

    @property
    def members(self) -> list[list[int]]:
        """Positions of the leaves of every group."""
        pruned = [i for i, yes in enumerate(self.chosen) if yes]
        return [pruned] if self.scope == "global" else [[i] for i in pruned]

    def layers(self, group: Sequence[int]) -> int | None:
        """Number of thresholds of a group of one stacked leaf; None for a single threshold."""
        alone = self.scope != "global" and self.stacked[group[0]]
        return self.shapes[group[0]][0] if alone else None

    @property
    def sizes(self) -> list[int]:
        """Number of weights below every threshold, group by group."""
        sizes = []
        for group in self.members:
            total = sum(self.size(i) for i in group)
            layers = self.layers(group)
            sizes += [total] if layers is None else [total // max(layers, 1)] * layers
        return sizes

    def size(self, leaf: int) -> int:
        """Number of weights of a leaf."""
        return math.prod(self.shapes[leaf])

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(self.sizes)

    @property
    def layout(self) -> _layout.Layout | None:
        """Tiles of the pattern; None without one."""
        if self.pattern is None:
            return None
        return _layout.layout_of(
            self.pattern, self.names, self.shapes, tuple(self.chosen), self.stacked
        )

    @property
    def thresholds(self) -> _densities.Thresholds:
        """Weights below every threshold, one or several for each leaf."""
        return _densities.thresholds_of(self)

    @property
    def fully_patterned(self) -> bool:
        """Whether the pattern gives the final sparsity, as n of m does."""
        return self.pattern is not None and self.pattern.kind == "n_m"

    def most_to_prune(self, leaf: int) -> int:
        """Number of weights of a leaf that can be pruned."""
        return _layout.most_to_prune(self.layout, self.shapes, leaf)

    @property
    def remainders(self) -> tuple[tuple[str, int], ...]:
        """Name and number of weights of the leaves that the pattern does not divide."""
        if self.pattern is None:
            return ()
        left = [
            (self.names[i], self.size(i) - sum(covered(self.shapes[i], t) for t in tiles[:1]))
            for i, yes in enumerate(self.chosen)
            if yes and (tiles := self.layout.tiles_of(i)) is not None
        ]
        return tuple((name, number) for name, number in left if number)

    @property
    def left_out(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Name, shape and reason of every leaf that is not pruned."""
        rows = zip(self.names, self.shapes, self.reasons, strict=True)
        return tuple(row for row in rows if row[2] is not None)


def make_groups(
    tree: Any,
    prunable: _prunable.LeafSelection,
    scope: Scope,
    stacked: Any | None = None,
    pattern: Pattern | None = None,
) -> Groups:
    """Decides, from the weights, which leaves are pruned and how.

    Args:
        tree: Weights, any pytree of arrays.
        prunable: Leaves that may be pruned, in any form of `_prunable.select`.
        scope: `global`, `layer`, `erk`, or a mapping from expressions to densities.
        stacked: Leaves with a leading axis of layers, in any form of `_tree.stacked_leaves`.
        pattern: Weights that live or die together; None for single weights.

    Raises:
        ValueError: An unknown scope, a selection that is invalid or empty, a pattern that does not
            fit the leaves.
    """
    check_scope(scope)
    check_pattern(pattern)
    layered = _tree.stacked_leaves(tree, stacked, "stacked")
    reasons = _prunable.reasons(tree, prunable, "prunable", layered)
    return of_leaves(_tree.named_leaves(tree), reasons, layered, scope, pattern)


def of_leaves(
    leaves: Sequence[tuple[str, Any]],
    reasons: Sequence[str | None],
    stacked: Sequence[bool],
    scope: Scope,
    pattern: Pattern | None,
) -> Groups:
    """Groups of named leaves, from whether each is prunable and stacked.

    Raises:
        ValueError: A pattern, or densities, that do not fit the leaves.
    """
    names = tuple(name for name, _ in leaves)
    shapes = tuple(tuple(jnp.shape(leaf)) for _, leaf in leaves)
    own = zip(reasons, _layout.reasons(pattern, names), strict=True)
    reasons = tuple(first or second for first, second in own)
    by_name = isinstance(scope, Mapping)
    chosen = [reason is None for reason in reasons]
    groups = Groups(
        *(names, shapes, reasons, tuple(stacked), "densities" if by_name else scope, pattern),
        _densities.by_name(scope, names, chosen) if by_name else None,
    )
    if pattern is not None and pattern.couplings and scope != "global":
        raise ValueError(
            "scope must be 'global' for a pattern with couplings, because their units lie in "
            f"several leaves, got {_text.shown(scope)}"
        )
    if groups.layout is not None and not groups.layout.families:
        raise ValueError(f"pattern: no prunable leaf is as large as one group of {pattern}")
    if groups.scope in ("erk", "densities"):
        groups.thresholds  # raises for densities that can't be had  # noqa: B018
    return groups


def zeros_in(groups: Groups, masks: Any) -> list[jax.Array]:
    """Number of pruned weights below every threshold, int32; jit-compatible."""
    return jitted(_zeros_below, groups)(jax.tree.leaves(masks))


def _zeros_below(groups: Groups, leaves: list[jax.Array]) -> list[jax.Array]:
    counts = []
    for group in groups.members:
        layers = groups.layers(group)
        if layers is None:
            counts.append(sum(_tree.count(~leaves[i]) for i in group))
        else:
            mask = leaves[group[0]]
            counts += list(jnp.sum(~mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32))
    return counts


def first_masks(params: Any, groups: Groups, masks: Any, argument: str = "masks") -> Any:
    """Masks that a pruning starts from.

    Args:
        params: Weights.
        groups: Leaves that are pruned.
        masks: `"zeros"` for the zeros of the weights, see `_held`; None for no masks; or a pytree
            of booleans like the parameters.
        argument: Name of the argument, for error messages.

    Returns:
        A pytree of booleans like the parameters, placed like them.

    Raises:
        ValueError: Masks of another structure, shape or dtype, or another string.
    """
    if masks is None:
        found = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    elif isinstance(masks, str):
        if masks != "zeros":
            raise ValueError(
                f"{argument} must be 'zeros', None or a pytree of booleans, got "
                f"{_text.shown(masks)}"
            )
        leaves, tree = jax.tree.flatten(params)
        found = tree.unflatten(jitted(_non_zeros, _held(params, groups), groups.stacked)(leaves))
    else:
        check_masks(params, masks, argument)
        found = jax.tree.map(lambda m: jnp.array(m, bool), masks)
    return placement.like(found, params)


def check_masks(params: Any, masks: Any, argument: str = "masks") -> None:
    """Raises a ValueError unless masks are booleans like the parameters."""
    _tree.check_same(params, masks, argument)
    for name, mask in _tree.named_leaves(masks):
        if getattr(mask, "dtype", None) != jnp.dtype(bool):
            raise ValueError(
                f"{argument} must be booleans, True for weights that are kept, but {name!r} has "
                f"{getattr(mask, 'dtype', type(mask).__name__)}"
            )


def warn_of_zeros(groups: Groups, masks: Any) -> None:
    """Warns of weights that training would hold at zero because they start there."""
    found = already_pruned(groups, masks)
    if found:
        names = ", ".join(f"{name} ({number:,})" for name, number in found[:8])
        more = f" and {len(found) - 8} more leaves" if len(found) > 8 else ""
        warnings.warn(
            f"weights that are zero now are held at zero: {names}{more}; pass masks=None to train "
            "them",
            stacklevel=3,
        )


def already_pruned(groups: Groups, masks: Any) -> tuple[tuple[str, int], ...]:
    """Name and number of zeros of the leaves in which masks prune; empty under `jit`."""
    leaves = jax.tree.leaves(masks)
    if is_traced(leaves):
        return ()
    counts = map(int, jax.device_get(jitted(_zeros)(leaves)))
    return tuple((name, n) for name, n in zip(groups.names, counts, strict=True) if n)


def _zeros(masks: list[jax.Array]) -> list[jax.Array]:
    return [_tree.count(~mask) for mask in masks]


def _held(params: Any, groups: Groups) -> tuple[bool, ...]:
    """Whether the zeros of each leaf count as pruned: if it is prunable, now or by default.

    A leaf that an earlier call pruned and this one does not keeps its zeros too.  Biases and the
    like do not count, since they often start at zero.
    """
    leaves = _tree.named_leaves(params)
    by_default = _prunable.default_reasons(leaves, groups.stacked)
    pairs = zip(groups.chosen, by_default, strict=True)
    return tuple(yes or reason is None for yes, reason in pairs)


def _non_zeros(
    held: Sequence[bool], stacked: Sequence[bool], leaves: list[jax.Array]
) -> list[jax.Array]:
    """Masks of the non-zero entries; an all-zero leaf, or layer of a stack, counts as untrained."""
    masks = []
    for p, zeros_count, layered in zip(leaves, held, stacked, strict=True):
        kept = p != 0 if zeros_count else jnp.ones(p.shape, bool)
        axes = tuple(range(1 if layered else 0, kept.ndim))
        masks.append(kept | ~jnp.any(kept, axis=axes, keepdims=True))
    return masks
