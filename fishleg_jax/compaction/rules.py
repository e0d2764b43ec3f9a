"""Axes of an operation's results, from those of its operands."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction import dependence
from fishleg_jax.compaction.axes import Axis
from fishleg_jax.compaction.tape import SAME, Step, Tape

Axes = list[Axis]


def name_axes(tape: Tape) -> None:
    """Gives every value on a tape its axes; arguments and arrays closed over have theirs."""
    together: list[_axes.Factor] = []
    for step in tape.steps:
        for value in step.operands:
            if len(value.axes) != len(value.shape):  # a number written into the program
                value.axes = [_axes.new(n) for n in value.shape]
        found = RULES.get(step.name, _elementwise)(step, [x.axes for x in step.operands])
        for value, axes in zip(step.results, found, strict=True):
            value.axes = axes
        if step.name == "concatenate":
            together += step.results[0].axes[step.params["dimension"]]
    for factor in together:
        factor.settle()


def _elementwise(step: Step, operands: list[Axes]) -> list[Axes]:
    """Operands of elementwise operations have the same axes; of others nothing is known."""
    if not step.is_elementwise():
        return _unknown(step, operands)
    return [_joined(step.results[0].shape, operands)]


def _joined(shape: Sequence[int], operands: Sequence[Axes]) -> Axes:
    """Axes of arrays that an operation aligns; axes of size 1, and scalars, are broadcast."""
    result = []
    for i, n in enumerate(shape):
        known = [axes[i] for axes in operands if axes and (axes[i] or n == 1)]
        for other in known[1:]:
            _axes.unify(known[0], other)
        result.append(known[0] if known else _axes.new(n))
    return result


def _unknown(step: Step, operands: list[Axes]) -> list[Axes]:
    """Pins everything."""
    reason = f"enters the operation {step.name!r}, which may treat its indices differently"
    for axis in (axis for axes in operands for axis in axes):
        _axes.pin(axis, reason)
    return [[_axes.new(n, reason) for n in value.shape] for value in step.results]


def _pinned_along(parameter: str) -> Callable:
    """Rule of operations that go along one or several dimensions in their order."""

    def rule(step, operands):
        dimensions = np.atleast_1d(step.params[parameter]).tolist()
        axes = [x for x in operands if x]
        for i in dimensions:
            for x in axes:
                _axes.pin(x[i], f"is gone through in its order by {step.name!r}")
        joined = _joined(step.results[0].shape, axes)
        return [list(joined) for _ in step.results]

    return rule


def _reduced(step: Step, operands: list[Axes]) -> list[Axes]:
    dimensions = step.params["axes"]
    for axes in operands:
        for i in dimensions:
            if step.name in ("argmax", "argmin"):
                _axes.pin(axes[i], f"is numbered by {step.name!r}")
            _axes.mix(axes[i], f"{step.name!r} computes one number of all its units")
    rest = [a for i, a in enumerate(operands[0]) if i not in dimensions]
    return [list(rest) for _ in step.results]


def _dot(step: Step, operands: list[Axes]) -> list[Axes]:
    (left_in, right_in), (left_batch, right_batch) = step.params["dimension_numbers"]
    left, right = operands
    pairs = zip((*left_in, *left_batch), (*right_in, *right_batch), strict=True)
    for i, j in pairs:
        _axes.unify(left[i], right[j])
    free = [a for i, a in enumerate(left) if i not in (*left_in, *left_batch)]
    free += [a for j, a in enumerate(right) if j not in (*right_in, *right_batch)]
    return [[left[i] for i in left_batch] + free]


def _convolution(step: Step, operands: list[Axes]) -> list[Axes]:
    inputs, kernel, out = step.params["dimension_numbers"]
    groups = step.params["feature_group_count"]
    if step.params["batch_group_count"] != 1:
        return _unknown(step, operands)
    images, weights = operands
    place = "is a place in an image"
    for i in inputs[2:]:
        _axes.pin(images[i], place)
    for i in kernel[2:]:
        _axes.pin(weights[i], place)
    # Channels of a grouped convolution are groups, and channels within a group.
    outputs = step.operands[1].shape[kernel[0]]
    group = _axes.new(groups)
    _axes.unify([*group, *weights[kernel[1]]], images[inputs[1]])
    within = [*group, *_axes.new(outputs // groups)]
    _axes.unify(within, weights[kernel[0]])
    result: Axes = [_axes.new(n, place) for n in step.results[0].shape]
    result[out[0]], result[out[1]] = images[inputs[0]], weights[kernel[0]]
    return [result]


def _reshape(step: Step, operands: list[Axes]) -> list[Axes]:
    if step.params.get("dimensions") is not None:
        return _unknown(step, operands)
    result = [_axes.new(n) for n in step.results[0].shape]
    _axes.unify([f for a in operands[0] for f in a], [f for a in result for f in a])
    return [result]


def _transpose(step: Step, operands: list[Axes]) -> list[Axes]:
    return [[operands[0][i] for i in step.params["permutation"]]]


def _broadcast(step: Step, operands: list[Axes]) -> list[Axes]:
    shape = step.results[0].shape
    result = [_axes.new(n) for n in shape]
    for i, j in enumerate(step.params["broadcast_dimensions"]):
        if step.operands[0].shape[i] == shape[j]:
            result[j] = operands[0][i]
    return [result]


def _squeeze(step: Step, operands: list[Axes]) -> list[Axes]:
    dimensions = step.params["dimensions"]
    return [[a for i, a in enumerate(operands[0]) if i not in dimensions]]


def _iota(step: Step, operands: list[Axes]) -> list[Axes]:
    result = [_axes.new(n) for n in step.results[0].shape]
    _axes.pin(result[step.params["dimension"]], "is numbered by 'iota'")
    return [result]


def _part(axis: Axis, size: int, whole: int, aligned: bool) -> Axis:
    """Axis of a part of an axis: one of several equal ones, or unknown."""
    if size == whole:
        return axis
    if aligned:
        parts, part = _axes.new(whole // size, "is taken apart"), _axes.new(size)
        _axes.unify(axis, [*parts, *part])
        return part
    _axes.pin(axis, "is taken apart")
    return _axes.new(size, "is taken apart")


def _slice(step: Step, operands: list[Axes]) -> list[Axes]:
    starts, ends = step.params["start_indices"], step.params["limit_indices"]
    strides = step.params["strides"] or (1,) * len(starts)
    result = []
    rows = zip(operands[0], step.operands[0].shape, starts, ends, strides, strict=True)
    for axis, whole, start, end, stride in rows:
        size = -(-(end - start) // stride)
        aligned = stride == 1 and size > 1 and whole % size == 0 and start % size == 0
        result.append(_part(axis, size, whole, aligned))
    return [result]


def _split(step: Step, operands: list[Axes]) -> list[Axes]:
    sizes, along = [int(n) for n in step.params["sizes"]], step.params["axis"]
    whole = step.operands[0].shape[along]
    results = []
    for size in sizes:
        axes = list(operands[0])
        axes[along] = _part(axes[along], size, whole, size > 1 and len(set(sizes)) == 1)
        results.append(axes)
    return results


def _concatenate(step: Step, operands: list[Axes]) -> list[Axes]:
    along = step.params["dimension"]
    sizes = [x.shape[along] for x in step.operands]
    others = [[[] if i == along else a for i, a in enumerate(axes)] for axes in operands]
    shape = [1 if i == along else n for i, n in enumerate(step.results[0].shape)]
    result = _joined(shape, others)
    result[along] = _axes.new(sum(sizes), _axes.PUT_TOGETHER)
    pieces = [axes[along] for axes in operands]
    if len(sizes) == 1:
        result[along] = pieces[0]
    elif len(set(sizes)) == 1 and sizes[0] > 1:
        # settled when it is known whether the pieces are taken apart again
        result[along] = [_axes.put_together(pieces, sum(sizes))]
    else:
        for axis in pieces:
            _axes.pin(axis, _axes.PUT_TOGETHER)
    return [result]


def _resized(step: Step, operands: list[Axes]) -> list[Axes]:
    """Dimensions that stay as they are keep their axes; others are pinned."""
    if len(step.results) != 1:
        return _unknown(step, operands)
    result = []
    for i, (axis, m) in enumerate(zip(operands[0], step.results[0].shape, strict=True)):
        if dependence.is_untouched(step, i):
            result.append(axis)
            continue
        reason = f"is a place in {step.name!r}"
        _axes.pin(axis, reason)
        result.append(_axes.new(m, reason))
    return [result]


def _gather(step: Step, operands: list[Axes]) -> list[Axes]:
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    table, indices = operands
    if numbers.operand_batching_dims:
        return _unknown(step, operands)
    shape = step.results[0].shape
    rows = iter(indices[:-1])
    kept = [i for i in range(len(table)) if i not in numbers.collapsed_slice_dims]
    columns = iter(kept)
    result: Axes = []
    for k, n in enumerate(shape):
        i = next(columns) if k in numbers.offset_dims else None
        if i is None:
            result.append(next(rows))
        elif sizes[i] == step.operands[0].shape[i]:
            result.append(table[i])
        else:
            result.append(_axes.new(n, "is looked up"))
    for i, size in enumerate(sizes):
        if size != step.operands[0].shape[i]:
            _axes.pin(table[i], "is looked up by index")
    return [result]


def _index(step: Step, operands: list[Axes]) -> list[Axes]:
    _axes.pin(operands[0][0], "is gone through by a loop")
    return [operands[0][1:]]


def _stack(step: Step, operands: list[Axes]) -> list[Axes]:
    layers = _axes.new(len(operands), "is gone through by a loop")
    return [[layers, *_joined(step.operands[0].shape, operands)]]


def _unchanged(step: Step, operands: list[Axes]) -> list[Axes]:
    return operands


RULES: dict[str, Callable[[Step, list[Axes]], Any]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "iota": _iota,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "gather": _gather,
    "index": _index,
    "stack": _stack,
    "rev": _pinned_along("dimensions"),
    **dict.fromkeys(SAME, _unchanged),
    **dict.fromkeys(("pad", "dynamic_slice"), _resized),
    **dict.fromkeys(dependence.WINDOWS, _resized),
    **{name: _pinned_along(parameter) for name, parameter in dependence.ALONG.items()},
    **dict.fromkeys(dependence.REDUCTIONS, _reduced),
}
