"""Which entries of every value of a network depend on its inputs.

Products with exact zeros cut the dependence: a unit without incoming weights gives out the same
for all inputs, and so do the units behind it that see nothing else.
"""

import jax.numpy as jnp
import numpy as np

from fishleg_jax.compaction.tape import Step, Tape, Value

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
SAME = ("convert_element_type", "copy", "copy_p", "device_put", "reduce_precision", "stop_gradient")
PRODUCTS = ("dot_general", "conv_general_dilated", "mul")
WINDOWS = ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")


def mark(tape: Tape, inputs: list[Value]) -> None:
    """Marks which values, and which of their entries, depend on the inputs."""
    for value in inputs:
        value.from_inputs, value.varies = True, np.ones(value.shape, bool)
    for step in tape.steps:
        from_inputs = any(x.from_inputs for x in step.operands)
        varying = any(x.varies is not None and x.varies.any() for x in step.operands)
        found = _varies(step) if varying else [None] * len(step.results)
        for value, varies in zip(step.results, found, strict=True):
            value.from_inputs, value.varies = from_inputs, varies


def varies(value: Value) -> np.ndarray:
    """Whether each entry depends on the inputs, always an array."""
    return np.zeros(value.shape, bool) if value.varies is None else value.varies


def nonzero(value: Value) -> np.ndarray:
    """Whether each entry is, or may be for other inputs, another number than 0."""
    return (np.asarray(value.array) != 0) | varies(value)


def _varies(step: Step) -> list[np.ndarray]:
    shape = step.results[0].shape
    if step.name in PRODUCTS:
        one, two = step.operands
        return [
            _product(step, varies(one), nonzero(two)) | _product(step, nonzero(one), varies(two))
        ]
    if step.name in MOVES:
        return [np.asarray(x) for x in step.run(*(varies(x) for x in step.operands))]
    if step.name in SAME:
        return [varies(step.operands[0])]
    if step.name == "gather":
        return [_looked_up(step)]
    if step.name.startswith(("reduce_", "arg")) and "axes" in step.params:
        along = tuple(step.params["axes"])
        found = np.any([varies(x).any(axis=along) for x in step.operands], axis=0)
        return [found] * len(step.results)
    if step.name in WINDOWS:
        return [_windows(step)]
    if step.is_aligned():
        return [np.any([np.broadcast_to(varies(x), shape) for x in step.operands], axis=0)]
    return [np.ones(x.shape, bool) for x in step.results]


def _product(step: Step, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Whether any product of two entries that are both marked goes into a result."""
    if not one.any() or not two.any():
        return np.zeros(step.results[0].shape, bool)
    arrays = (jnp.asarray(x, y.array.dtype) for x, y in zip((one, two), step.operands, strict=True))
    return np.asarray(step.run(*arrays)[0]) > 0


def _looked_up(step: Step) -> np.ndarray:
    """Entries looked up by varying indices vary, except in columns of a table that are all 0."""
    table, indices = step.operands
    found = nonzero(table) if indices.varies is not None and indices.varies.any() else varies(table)
    sizes = zip(step.params["slice_sizes"], table.shape, strict=True)
    along = tuple(i for i, (size, whole) in enumerate(sizes) if size != whole)
    found = np.broadcast_to(found.any(axis=along, keepdims=True), table.shape)
    marked = jnp.asarray(found, jnp.float32)
    return np.asarray(step.run(marked, indices.array)[0]) > 0


def _windows(step: Step) -> np.ndarray:
    """A window varies if anything does in the dimensions that it spans."""
    found = varies(step.operands[0])
    along = tuple(i for i, n in enumerate(step.params["window_dimensions"]) if n > 1)
    return np.broadcast_to(found.any(axis=along, keepdims=True), found.shape)[
        tuple(slice(0, n) for n in step.results[0].shape)
    ]
