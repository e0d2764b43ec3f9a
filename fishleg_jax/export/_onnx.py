"""ONNX files of pruned networks, by jax2onnx, checked by onnxruntime."""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fishleg_jax import _files
from fishleg_jax.export import _extra
from fishleg_jax.export._arguments import as_tuple, function_of, masked
from fishleg_jax.export._functions import input_shapes

TOLERANCE = 1e-4  # of the largest output; float32 sums in another order stay below 1e-5


def to_onnx(
    function: Callable[..., Any],
    params: Any,
    example_inputs: Any,
    path: str | os.PathLike[str],
    masks: Any | None = None,
    *,
    dynamic_batch: bool = True,
) -> float:
    """Writes a function as an ONNX file, with its parameters inside, and checks it.

    Masks are applied before the conversion: masks inside the function would stay in the file, and
    be multiplied at every call.  The file runs in onnxruntime on the example before it is written,
    and must give what JAX gives.

    Args:
        function: Function `(params, *inputs) -> outputs`, or a `Model`.
        params: Pytree of arrays, which become initializers.
        example_inputs: Array, or tuple of pytrees of arrays: the inputs to check the file on.
        path: Path of the file; it is written beside and then renamed, replacing an existing one.
        masks: Pytree of booleans like the parameters; weights outside them become zeros.  None for
            none.
        dynamic_batch: Whether inputs may have any number of examples, True by default: the first
            axis of every array with axes is one symbolic size.

    Returns:
        Largest difference between the outputs of onnxruntime and of JAX, divided by the largest
        output.

    Raises:
        ImportError: jax2onnx or onnxruntime is not installed.
        ValueError: A path in a folder that does not exist, something else than a function, masks of
            another structure or dtype, no array in the example, outputs that are NaN, or a function
            that jax2onnx converts to a file with other outputs, or not at all.

    References:
        ONNX, https://onnx.ai; jax2onnx, https://pypi.org/project/jax2onnx.
    """
    _files.check_place(path)
    inputs = as_tuple(example_inputs)
    function, params = function_of(function, inputs), masked(params, masks)
    shapes = jax.tree.leaves(input_shapes(inputs, "batch" if dynamic_batch else None))
    leaves, structure = jax.tree.flatten(inputs)

    def run(*arrays: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(function(params, *structure.unflatten(arrays))))

    checks = [leaves]
    if dynamic_batch:  # also on one example more
        checks.append([np.concatenate([x, x[:1]]) if np.ndim(x) else x for x in leaves])
    expected = [jax.tree.map(np.asarray, jax.jit(run)(*arrays)) for arrays in checks]
    if any(np.isnan(np.asarray(x, np.float64)).any() for outputs in expected for x in outputs):
        raise ValueError(
            "function gives NaN on example_inputs, so there is nothing to check the file against: "
            "look for NaN in params and example_inputs"
        )
    jax2onnx = _extra.package("jax2onnx", "to_onnx")
    onnxruntime = _extra.package("onnxruntime", "to_onnx")
    reasons = []
    for convert in (_converted, _converted_with_transposes):
        try:
            with _quiet():
                model = convert(jax2onnx, run, shapes).SerializeToString()
                found = [_outputs(onnxruntime, model, arrays) for arrays in checks]
        except Exception as error:  # of either package, of no common base
            reasons.append(str(error).splitlines()[0])
            continue
        difference = max(map(_difference, found, expected))
        if difference <= TOLERANCE:
            _files.write(path, lambda file, model=model: file.write(model))
            return difference
        reasons.append(f"outputs differ by {difference:.2g} of the largest")
    fixed = "; fix the batch size with dynamic_batch=False" if dynamic_batch else ""
    raise ValueError(f"function can't be converted to ONNX{fixed}: {'; '.join(reasons)}")


def _converted(jax2onnx: Any, run: Callable[..., Any], shapes: Sequence[Any]) -> Any:
    return jax2onnx.to_onnx(run, shapes)


def _converted_with_transposes(
    jax2onnx: Any, run: Callable[..., Any], shapes: Sequence[Any]
) -> Any:
    """Converts without a step that takes out pairs of transpositions.

    In jax2onnx 0.17.1 it mixes up layouts in residual networks, see
    findings/residual_networks_in_onnx.sh; onnxruntime takes most of these pairs out by itself.
    """
    module = importlib.import_module("jax2onnx.converter.ir_optimizations")
    passes = module._OPTIMIZER_PASSES
    module._OPTIMIZER_PASSES = tuple(
        x for x in passes if x.name != "remove_redundant_transpose_pairs"
    )
    try:
        return jax2onnx.to_onnx(run, shapes)
    finally:
        module._OPTIMIZER_PASSES = passes


def _outputs(onnxruntime: Any, model: bytes, arrays: Sequence[Any]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))


def _difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest difference over the largest output; infinite where shapes differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    apart, sizes = [], []
    for x, y in zip(found, expected, strict=True):
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        gap = np.subtract(x, y, out=np.zeros(x.shape), where=x != y)  # infinities may be equal
        apart.append(np.max(np.abs(gap), initial=0))
        sizes.append(np.max(np.abs(y), initial=0, where=np.isfinite(y)))
    return float(np.max(apart) / (max(sizes) or 1.0))  # of NaN in either file NaN


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences onnx_ir, which warns of every shape that it leaves out."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
