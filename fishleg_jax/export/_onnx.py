"""ONNX files of pruned networks, by jax2onnx, checked by onnxruntime."""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _files
from fishleg_jax._checks import numbers
from fishleg_jax._checks.arrays import check_untraced
from fishleg_jax._jaxpr import core
from fishleg_jax.export import _extra
from fishleg_jax.export._arguments import OUTSIDE, as_tuple, function_of, masked
from fishleg_jax.export._functions import batch_remedy, first_line, input_shapes
from fishleg_jax.export._kernels import fold_kernels

TOLERANCE = 1e-5  # of the largest output; networks of the experiments stay below 1e-6


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
    be multiplied at every call.  Transpositions, reshapes and casts of a kernel that nothing else
    reads are carried out, too, so that its operator reads it as stored.  jax2onnx has operators for
    whole layers of flax and functions of `jax.numpy`; a function that does not convert with them,
    such as a decomposed network, is converted from the operations of JAX.  The file runs in
    onnxruntime on the example before it is written, and must give what JAX gives to within 1e-5 of
    the largest output.

    Args:
        function: Function `(params, *inputs) -> outputs`, or a `Model`.
        params: Pytree of arrays, which become initializers.
        example_inputs: Array, or tuple of pytrees of arrays: the inputs to check the file on.  The
            file takes the dtypes that JAX gives them, such as float32 for float64.
        path: Path of the file; it is written beside and then renamed, replacing an existing one.
        masks: Pytree of booleans like the parameters; weights outside them become zeros.  None for
            none.
        dynamic_batch: Whether inputs may have any number of examples, True by default: the first
            axis of every array with axes is one symbolic size.

    Returns:
        Largest difference between the outputs of onnxruntime and of JAX, divided by the largest
        output; 1e-5 or less.

    Raises:
        ImportError: jax2onnx or onnxruntime is not installed.
        ValueError: A path in a folder that does not exist, something else than a function, masks of
            another structure or dtype, no array in the example, outputs that are NaN, a call under
            jit, or a function that jax2onnx converts to a file with other outputs, or not at all,
            such as one in bfloat16 or one that needs a known batch size.

    References:
        ONNX, https://onnx.ai; jax2onnx, https://pypi.org/project/jax2onnx.
    """
    _files.check_place(path)
    numbers.check_flag(dynamic_batch, "dynamic_batch")
    inputs = as_tuple(example_inputs)
    check_untraced(OUTSIDE, "to_onnx", params=params, example_inputs=inputs, masks=masks)
    function, params = function_of(function, inputs), masked(params, masks)
    # onnxruntime refuses float64 for a file in float32, where JAX would convert
    inputs = jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), inputs)
    shapes = jax.tree.leaves(input_shapes(inputs, "batch" if dynamic_batch else None))
    leaves, structure = jax.tree.flatten(inputs)

    def run(*arrays: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(function(params, *structure.unflatten(arrays))))

    checks = [leaves]
    if dynamic_batch:  # also on one example more
        checks.append([np.concatenate([x, x[:1]]) if np.ndim(x) else x for x in leaves])
    with jax.default_matmul_precision("highest"):  # GPUs round inputs of products by default
        expected = [jax.tree.map(np.asarray, jax.jit(run)(*arrays)) for arrays in checks]
    if any(np.isnan(np.asarray(x, np.float64)).any() for outputs in expected for x in outputs):
        raise ValueError(
            "function gives NaN on example_inputs, so there is nothing to check the file against: "
            "look for NaN in params and example_inputs"
        )
    packages = [_extra.package(x, "to_onnx") for x in ("jax2onnx", "onnx", "onnxruntime")]
    attempts = _Attempts(*packages, run)
    model, difference = attempts.file(shapes, checks, expected)
    if model is None:
        reasons, remedy = "; ".join(dict.fromkeys(attempts.reasons)), ""
        if attempts.dtypes:
            names = " and ".join(sorted(attempts.dtypes))
            remedy = f": onnxruntime lacks operators for {names}; cast to float32"
        elif dynamic_batch:  # is the batch size the cause?
            fixed = jax.tree.leaves(input_shapes(inputs, None))
            if attempts.file(fixed, checks[:1], expected[:1])[0] is not None:
                remedy = batch_remedy(reasons)
        raise ValueError(f"function can't be converted to ONNX{remedy}: {reasons}")
    _files.write(path, lambda file: file.write(model))
    return difference


class _Attempts:
    """Conversions of a function in several ways, and why they failed.

    While jax2onnx traces a function, it replaces layers of flax, `jnp.einsum` and others by
    operations of its own, which become fewer operators.  A function that inspects traces, such as
    one of `low_rank.apply`, does not know them.  If the conversion fails, JAX traces the function
    first, so that jax2onnx sees nothing but operations of JAX.

    Attributes:
        reasons: One line for each failure of the function traced first.
        dtypes: Names of the dtypes in a file that did not run which NumPy does not have.
    """

    def __init__(self, jax2onnx: Any, onnx: Any, onnxruntime: Any, run: Callable[..., Any]):
        self.jax2onnx, self.onnx, self.onnxruntime, self.run = jax2onnx, onnx, onnxruntime, run
        self.reasons: list[str] = []
        self.dtypes: set[str] = set()

    def file(
        self, shapes: Sequence[Any], checks: Sequence[Any], expected: Sequence[Any]
    ) -> tuple[bytes | None, float]:
        """Content of the first file with the expected outputs, and the difference; or None."""
        for traced, convert in product((False, True), (_converted, _converted_with_transposes)):
            model = None
            if traced and convert is _converted:
                self.reasons.clear()  # those so far may be of jax2onnx's replacements alone
            try:
                with _quiet():
                    run = _of_primitives(self.run, shapes) if traced else self.run
                    with _traces_apart(), _numpy_as_it_was():
                        model = convert(self.jax2onnx, run, shapes)
                    fold_kernels(self.onnx, model)
                    content = model.SerializeToString()
                    found = [_outputs(self.onnxruntime, content, arrays) for arrays in checks]
            except Exception as error:  # of either package, of no common base
                self.reasons.append(first_line(error))
                if model is not None:
                    self.dtypes |= _dtypes_beyond_numpy(self.onnx, model)
                continue
            difference = max(map(_difference, found, expected))
            if difference <= TOLERANCE:
                return content, difference
            self.reasons.append(f"outputs differ by {difference:.2g} of the largest")
        return None, float("inf")


def _dtypes_beyond_numpy(onnx: Any, model: Any) -> set[str]:
    """Names of dtypes such as bfloat16 in a model, for which onnxruntime has few operators."""
    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    codes = {x.type.tensor_type.elem_type for x in values}
    codes |= {x.data_type for x in graph.initializer}
    dtypes = {onnx.helper.tensor_dtype_to_np_dtype(code) for code in codes if code}
    return {x.name for x in dtypes if x.isbuiltin != 1}


@contextlib.contextmanager
def _numpy_as_it_was() -> Iterator[None]:
    """Puts back the functions of `jax.numpy` that jax2onnx 0.17.1 leaves replaced.

    See findings/jax2onnx_keeps_cumsum.sh: `jnp.cumsum(x, 0)` would raise an error from then on.
    """
    before = dict(vars(jnp))
    try:
        yield
    finally:
        for name, value in before.items():
            if vars(jnp).get(name) is not value:
                setattr(jnp, name, value)


@contextlib.contextmanager
def _traces_apart() -> Iterator[None]:
    """Keeps traces made inside of it from functions under `jit` that are called outside.

    See findings/jax2onnx_keeps_traces.sh: such a function would have operations of jax2onnx in it
    from then on, which XLA does not know.
    """
    from jax.experimental.xla_metadata import set_xla_metadata

    with set_xla_metadata(traced_by="jax2onnx"):  # part of what `jit` looks traces up by
        yield


def _of_primitives(run: Callable[..., Any], shapes: Sequence[Any]) -> Callable[..., Any]:
    """Function traced by JAX alone; jax2onnx sees the operations of the trace."""
    return core().jaxpr_as_fun(jax.make_jaxpr(run)(*shapes))


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


def _outputs(onnxruntime: Any, model: bytes, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


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
