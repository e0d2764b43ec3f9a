"""Marks the entries of every value that depend on the inputs, and copies of leaves.

Products with exact zeros cut the dependence: a unit without incoming weights gives out the same
for all inputs, and so do the units behind it that see nothing else.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax.compaction.tape import SAME, Step, Tape, Value

# operations that copy entries, and run on booleans and on numbers of elements as well
MOVES = (
    "broadcast_in_dim",
    "concatenate",
    "index",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
    "stack",
    "transpose",
)
PRODUCTS = ("dot_general", "conv_general_dilated", "mul")
REDUCTIONS = ("argmax", "argmin") + tuple(
    f"reduce_{x}" for x in ("and", "max", "min", "or", "prod", "sum", "xor")
)
ALONG = {  # the parameter that names the dimension whose entries are mixed
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), "axis"),
    "sort": "dimension",
}
WINDOWS = ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")


def mark(tape: Tape, inputs: list[Value]) -> None:
    """Marks which values, and which of their entries, depend on the inputs."""
    for value in inputs:
        value.from_inputs, value.varies = True, jnp.ones(value.shape, bool)
    for step in tape.steps:
        if any(x.from_inputs for x in step.operands):
            for value, found in zip(step.results, _varies(step), strict=True):
                value.from_inputs, value.varies = True, found


def number(tape: Tape, leaves: Sequence[Value], numbers: Sequence[Any]) -> None:
    """Numbers the elements of leaves, and with them everything that only copies them."""
    for value, numbered in zip(leaves, numbers, strict=True):
        value.elements = numbered
    for step in tape.steps:
        elements = [x.elements for x in step.operands]
        if step.name in SAME:
            for value, found in zip(step.results, elements, strict=True):
                value.elements = found
        elif step.name in MOVES and all(x is not None for x in elements):
            for value, found in zip(step.results, step.run(*elements), strict=True):
                value.elements = found


def varies(value: Value) -> Any:
    """Whether each entry depends on the inputs, always an array."""
    return np.zeros(value.shape, bool) if value.varies is None else value.varies


def nonzero(value: Value) -> Any:
    """Whether each entry is, or may be for other inputs, another number than 0."""
    found = value.array != 0
    return found if value.varies is None else found | value.varies


def _varies(step: Step) -> list[Any]:
    shape = step.results[0].shape
    if step.name in PRODUCTS:
        one, two = step.operands
        pairs = ((varies(one), nonzero(two)), (nonzero(one), varies(two)))
        return [_product(step, *pairs[0]) | _product(step, *pairs[1])]
    if step.name in MOVES:
        return list(step.run(*(jnp.asarray(varies(x)) for x in step.operands)))
    if step.name in SAME:
        return [varies(x) for x in step.operands]
    if step.name == "gather":
        return [_looked_up(step)]
    if step.name in REDUCTIONS:
        return [varies(step.operands[0]).any(axis=tuple(step.params["axes"]))]
    if step.name in ALONG:
        along = step.params[ALONG[step.name]]
        found = _any([varies(x).any(axis=along, keepdims=True) for x in step.operands], shape)
        return [found] * len(step.results)
    if step.name in WINDOWS and len(step.results) == 1:
        return [_windows(step)]
    if step.is_elementwise():
        return [_any([varies(x) for x in step.operands], shape)]
    return [jnp.ones(x.shape, bool) for x in step.results]


def _any(marked: list[Any], shape: tuple[int, ...]) -> jax.Array:
    found = jnp.zeros(shape, bool)
    for x in marked:
        found = found | x
    return found


def _product(step: Step, one: Any, two: Any) -> jax.Array:
    """Whether any product of two entries that are both marked goes into a result."""
    pairs = zip((one, two), step.operands, strict=True)
    return step.run(*(jnp.asarray(x, y.array.dtype) for x, y in pairs))[0] > 0


def _looked_up(step: Step) -> jax.Array:
    """Entries looked up by varying indices vary, except in columns of a table that are all 0."""
    table, indices = step.operands
    found = nonzero(table) if indices.from_inputs else varies(table)
    sizes = zip(step.params["slice_sizes"], table.shape, strict=True)
    along = tuple(i for i, (size, whole) in enumerate(sizes) if size != whole)
    found = jnp.broadcast_to(found.any(axis=along, keepdims=True), table.shape)
    return step.run(jnp.asarray(found, jnp.float32), indices.array)[0] > 0


def _windows(step: Step) -> jax.Array:
    """A window varies if anything does in the dimensions that it spans or skips."""
    found = varies(step.operands[0])
    along = tuple(i for i in range(found.ndim) if not is_untouched(step, i))
    found = found.any(axis=along, keepdims=True)
    return jnp.broadcast_to(found, step.results[0].shape)


def is_untouched(step: Step, dimension: int) -> bool:
    """Whether a window, padding or slice takes a dimension's entries one by one, all in place."""
    if step.operands[0].shape[dimension] != step.results[0].shape[dimension]:
        return False
    plain = {
        "window_dimensions": 1,
        "window_strides": 1,
        "padding": (0, 0),
        "base_dilation": 1,
        "padding_config": (0, 0, 0),
    }
    given = [(step.params[name][dimension], x) for name, x in plain.items() if name in step.params]
    return all(found == expected for found, expected in given)
