"""How a network uses its leaves: which are kernels of dense layers and convolutions, and where."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fishleg_jax import _tree
from fishleg_jax._jaxpr import core, functions, opened

CALLS = ("jit", "pjit", "checkpoint", "remat2")


class Use(NamedTuple):
    """Leaf that is a kernel, wherever the network uses it.

    Attributes:
        order: Axes of the leaf in the order (spatial axes, in, out); a dense layer may have several
            axes of inputs and of outputs, each in the order of the leaf.
        inputs: Number of axes of inputs, 1 for a convolution.
        before: Sizes of the images that enter, axis by axis; empty for a dense layer.
        after: Sizes of the images that leave.
        calls: Number of products with the whole kernel per example: positions of a dense layer, or
            calls of a convolution.
    """

    order: tuple[int, ...]
    inputs: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    calls: float

    @property
    def inside(self) -> tuple[int, ...]:
        """Axes of a dense layer's inputs."""
        return self.order[: self.inputs]

    @property
    def outside(self) -> tuple[int, ...]:
        """Axes of a dense layer's outputs."""
        return self.order[self.inputs :]


class Kernel(NamedTuple):
    """Mark of a value that is a leaf with its axes in another order.

    Attributes:
        leaf: Anything that identifies the leaf.
        axes: Axis of the leaf at each axis of the value.
    """

    leaf: Any
    axes: tuple[int, ...]

    def moved(self, permutation: Sequence[int]) -> "Kernel":
        """The mark behind a transposition."""
        return self._replace(axes=tuple(self.axes[k] for k in permutation))


def find_uses(function: Callable, params: Any, *data: Any) -> list[Use | str]:
    """Traces a network and returns the use of each leaf, or the reason why it is not a kernel.

    Args:
        function: Function `(params, *data)`.
        params: Parameters, or their shapes.
        data: Inputs with a leading axis of examples, and constants.
    """
    leaves = _tree.named_leaves(params)
    closed = jax.make_jaxpr(function)(params, *data)
    examples = jax.tree.leaves(data[0])[0].shape[0]
    found: list[Use | str | None] = [None] * len(leaves)

    def add(i: int, new: Use | str) -> None:
        old = found[i]
        if old is None or isinstance(new, str):
            found[i] = new
        elif isinstance(old, Use):
            same = old[:-1] == new[:-1]
            found[i] = old._replace(calls=old.calls + new.calls) if same else "used in two ways"

    marks: list[Kernel | None] = [
        Kernel(i, tuple(range(x.ndim))) for i, (_, x) in enumerate(leaves)
    ]
    marks += [None] * (len(closed.jaxpr.invars) - len(marks))
    for mark in _walk(closed.jaxpr, marks, examples, add):
        if mark is not None:
            add(mark.leaf, "an output")
    return ["not used" if x is None else x for x in found]


def _walk(jaxpr: Any, marks: Sequence[Kernel | None], examples: int, add: Callable) -> list:
    known = dict(zip(jaxpr.invars, marks, strict=True))

    def read(atom):
        return None if isinstance(atom, core().Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        if not any(operands):
            continue
        inner = called(equation)
        if inner is not None:
            results = _walk(opened(inner), operands, examples, add)
            known.update(zip(equation.outvars, results, strict=True))
        elif (moved := passed_on(equation, operands)) is not None:
            known[equation.outvars[0]] = moved
        else:
            whole = [k for k, x in enumerate(operands) if x is not None]
            for k in whole:
                product = None if len(whole) > 1 else layer(equation, k, operands[k].axes, examples)
                reason = f"an operand of {equation.primitive.name}"
                add(operands[k].leaf, reason if product is None else product)
    return [read(x) for x in jaxpr.outvars]


def called(equation: Any) -> Any | None:
    """Finds the one function that an equation (`jit`, `checkpoint`) just calls."""
    if equation.primitive.name not in CALLS:
        return None
    inner = [x for x in functions(equation) if len(opened(x).invars) == len(equation.invars)]
    return inner[0] if len(inner) == 1 else None


def passed_on(equation: Any, operands: Sequence[Kernel | None]) -> Kernel | None:
    """Mark of the result of a transposition or a cast of a kernel."""
    if equation.primitive.name == "transpose":
        return operands[0].moved(equation.params["permutation"])
    if equation.primitive.name in ("convert_element_type", "copy", "stop_gradient"):
        return operands[0]
    return None


def layer(equation: Any, position: int, axes: tuple[int, ...], examples: int) -> Use | None:
    """Use of a kernel in one equation, if that is a dense layer or an ungrouped convolution."""
    other = equation.invars[1 - position].aval.shape if len(equation.invars) == 2 else None
    params = equation.params
    if equation.primitive.name == "dot_general":
        contracted, batched = params["dimension_numbers"]
        inside = sorted(axes[k] for k in contracted[position])
        outside = [k for k in range(len(axes)) if k not in inside]
        # a matrix of the leaf as it lies in memory: inputs are all of its first axes or of its last
        one_matrix = [*range(len(axes))] in ([*inside, *outside], [*outside, *inside])
        if any(batched) or not inside or not outside or not one_matrix:
            return None
        calls = math.prod(other) / math.prod(other[k] for k in contracted[1 - position]) / examples
        return Use((*inside, *outside), len(inside), (), (), calls)
    if equation.primitive.name == "conv_general_dilated" and position == 1:
        if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return None
        lhs, rhs, out = params["dimension_numbers"]
        order = tuple(axes[k] for k in (*rhs[2:], rhs[1], rhs[0]))
        result = equation.outvars[0].aval.shape
        sizes = tuple(other[k] for k in lhs[2:]), tuple(result[k] for k in out[2:])
        return Use(order, 1, *sizes, other[lhs[0]] / examples)
    return None
