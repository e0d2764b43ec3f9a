"""Units of a tree, each a leaf or a kernel with its bias, and the factor of each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _text, _tree
from fishleg_jax.inverse import factors as _factors


class Unit(NamedTuple):
    """One leaf, or a dense kernel and its bias, with one factor.

    Attributes:
        name: Key path of the leaf, or of the kernel.
        leaves: Positions of the leaves in the flattened tree.
        factor: Structure of Q; for stacked layers, of a single layer.
        stack: Number of layers along a leading axis, each with its own Q; the unit's part of a
            state has that axis as well.  None for a single layer without such an axis.
    """

    name: str
    leaves: tuple[int, ...]
    factor: _factors.Factor
    stack: int | None = None

    def each(self, function: Callable, *arguments: Any) -> Any:
        """Applies a function of one layer to all layers at once."""
        return function(*arguments) if self.stack is None else jax.vmap(function)(*arguments)

    def one_by_one(self, function: Callable, *arguments: Any) -> Any:
        """Like `each`, layer by layer, for decompositions: see `frames.decompose`."""
        if self.stack is None:
            return function(*arguments)
        return jax.lax.map(lambda layer: function(*layer), arguments)

    def repeated(self, tree: Any) -> Any:
        """Repeats one layer's part of a state for all layers."""
        if self.stack is None:
            return tree
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.stack, *x.shape)), tree)

    def pack(self, leaves: list[jax.Array]) -> jax.Array:
        """Returns the unit's tensor from a flattened tree, a bias as the last row of its kernel."""
        kernel = leaves[self.leaves[0]]
        if len(self.leaves) == 1:
            return kernel
        return jnp.concatenate([kernel, leaves[self.leaves[1]][..., None, :]], axis=-2)

    def unpack(self, tensor: jax.Array, leaves: list[jax.Array]) -> None:
        """Writes a tensor like that of `pack` back into the leaves of a flattened tree."""
        if len(self.leaves) == 1:
            shape = leaves[self.leaves[0]].shape
            leaves[self.leaves[0]] = tensor.reshape(shape)
        else:
            kernel, bias = self.leaves
            *stack, rows, columns = leaves[kernel].shape
            matrix = tensor.reshape(*stack, rows + 1, columns)
            leaves[kernel], leaves[bias] = matrix[..., :-1, :], matrix[..., -1, :]


def make_units(
    params: Any,
    choice: _factors.Constructor | Mapping[str, _factors.Constructor] | None,
    join_bias: str | bool,
    cap: int | None,
    stacked: _tree.Stacked = None,
) -> tuple[Unit, ...]:
    """Cuts a tree into units and assigns their factors.

    Args:
        params: Parameters, or their shapes.
        choice: Constructor for all leaves, or a mapping of regular expressions over key paths to
            constructors, the first match deciding.  Other leaves, or all for None, use
            `factors.by_shape`.
        join_bias: Whether biases share the factor of their dense kernel: True for all, or a regular
            expression over the key paths of these kernels.
        cap: Size of the largest dense block; None for whole axes.
        stacked: Leaves with a leading axis of layers, as in `_tree.stacked_leaves`.

    Raises:
        ValueError: An expression without a match, a kernel without a bias beside it, or a stacked
            leaf of fewer than two dimensions.
    """
    leaves = _tree.named_leaves(params)
    _tree.check_names(leaves)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not (choice is None or callable(choice) or isinstance(choice, Mapping)):
        raise ValueError(
            "factors must be a constructor of inverse.factors, a mapping of regular expressions to "
            f"constructors, or None, got {_text.shown(choice)}"
        )
    rules = {} if choice is None else {"": choice} if callable(choice) else dict(choice)
    found = {pattern: _tree.matches(pattern, leaves, "factors") for pattern in rules}
    stacks = _tree.stacked_leaves(params, stacked, "stacked")
    biases = _biases(leaves, paths, join_bias, stacks) if join_bias else {}
    # one unit per leaf, except biases that join their kernel
    units = []
    for i, (name, leaf) in enumerate(leaves):
        if i in biases.values():
            continue
        constructor = next((rules[p] for p in rules if found[p][i]), _factors.by_shape)
        members, shape = (i,), jnp.shape(leaf)
        stack, shape = (shape[0], shape[1:]) if stacks[i] else (None, shape)
        if i in biases:
            members, shape = (i, biases[i]), (shape[0] + 1, shape[1])
        if 0 in (stack, *shape):  # an empty leaf cannot be cut into blocks
            constructor, stack = _factors.diagonal, None
        try:
            units.append(Unit(name, members, constructor(shape, cap), stack))
        except ValueError as error:
            raise ValueError(f"factors, for leaf {name!r}: {error}") from error
    return tuple(units)


def _biases(leaves: list, paths: list, join_bias: str | bool, stacks: list[bool]) -> dict[int, int]:
    """Position of the bias beside each selected dense kernel."""
    wanted = [True] * len(leaves)
    if isinstance(join_bias, str):
        wanted = _tree.matches(join_bias, leaves, "join_bias")
    pairs = {}
    for i, (name, leaf) in enumerate(leaves):
        if not wanted[i] or jnp.ndim(leaf) != 2 + stacks[i]:
            continue
        # siblings with the shape of a bias
        expected = jnp.shape(leaf)[:-2] + jnp.shape(leaf)[-1:]
        depth = len(paths[i]) - (2 if _has_value(paths[i]) else 1)
        beside = [
            j
            for j, (_, other) in enumerate(leaves)
            if paths[j][:depth] == paths[i][:depth]
            and len(paths[j]) == len(paths[i])
            and jnp.shape(other) == expected
            and stacks[j] == stacks[i]
        ]
        # join the only one; with an expression, anything else is an error
        if len(beside) == 1 and beside[0] not in pairs.values():
            pairs[i] = beside[0]
        elif isinstance(join_bias, str):
            names = ", ".join(leaves[j][0] for j in beside) or "none"
            raise ValueError(
                f"join_bias={join_bias!r} matches {name!r}, which needs one bias of shape "
                f"{expected} beside it{', stacked like it' if stacks[i] else ''}, that no other "
                f"kernel joins; found: {names}"
            )
    return pairs


def _has_value(path: tuple) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator="/").endswith("/value")
