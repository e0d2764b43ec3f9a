"""Functions on disk for JAX itself: StableHLO, serialized by `jax.export`."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from fishleg_jax import _files, _text
from fishleg_jax._checks import numbers
from fishleg_jax._checks.arrays import check_untraced
from fishleg_jax.export._arguments import OUTSIDE, as_tuple, function_of, masked

MAGIC = b"FLJFUNC1"  # the last bytes of a file; a checksum stands before them
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # jax.export takes any other name and writes it down
DIGEST = hashlib.sha256().digest_size


def save_function(
    path: str | os.PathLike[str],
    function: Callable[..., Any],
    params: Any,
    example_inputs: Any,
    masks: Any | None = None,
    *,
    dynamic_batch: bool = True,
    platforms: Sequence[str] | None = None,
) -> None:
    """Compiles a function to StableHLO with its parameters inside, and writes it to a file.

    The file is the serialization of `jax.export` with a checksum behind it, which
    `jax.export.deserialize` passes over: JAX alone reads it.  Zeros take as much of it as other
    numbers; parameters of a smaller network are what makes it smaller.

    Args:
        path: Path of the file; it is written beside and then renamed, replacing an existing one.
        function: Function `(params, *inputs) -> outputs`, or a `Model`.
        params: Pytree of arrays, written into the file as constants.
        example_inputs: Array, or tuple of pytrees of arrays or `jax.ShapeDtypeStruct`, for shapes
            and dtypes.
        masks: Pytree of booleans like the parameters; weights outside them become constant zeros.
            None for none.
        dynamic_batch: Whether inputs may have any number of examples, True by default: the first
            axis of every array with axes is one symbolic size.
        platforms: Names among `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`; None for that of this
            process.

    Raises:
        ValueError: A path in a folder that does not exist, something else than a function, masks of
            another structure or dtype, examples without an array, unknown platforms, a call under
            jit, or a function that `jax.export` refuses, such as one that needs a known batch size.

    References:
        JAX documentation, "Exporting and serializing staged-out computations".

    Example:
        >>> import tempfile, jax.numpy as jnp, fishleg_jax as flj
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path, params = f"{folder}/net.stablehlo", jnp.array([[2.0], [0.0]])
        ...     flj.export.save_function(path, lambda w, x: x @ w, params, jnp.ones((1, 2)))
        ...     flj.export.load_function(path)(jnp.ones((3, 2)))
        Array([[2.],
               [2.],
               [2.]], dtype=float32)
    """
    from jax import export

    _files.check_place(path)
    numbers.check_flag(dynamic_batch, "dynamic_batch")
    inputs = as_tuple(example_inputs)
    check_untraced(OUTSIDE, "save_function", params=params, masks=masks)
    function = function_of(function, inputs)
    _check_platforms(platforms)
    params = masked(params, masks)
    shapes = input_shapes(inputs, "batch" if dynamic_batch else None)
    run = jax.jit(lambda *inputs: function(params, *inputs))
    try:
        exported = export.export(run, platforms=platforms)(*shapes)
    except Exception as error:
        reason, remedy = first_line(error), ""
        if dynamic_batch:
            try:  # is the batch size the cause?
                export.export(run, platforms=platforms)(*input_shapes(inputs, None))
            except Exception as fixed:
                reason = first_line(fixed)
            else:
                remedy = batch_remedy(reason)
        raise ValueError(f"function can't be exported{remedy}: {reason}") from error
    body = bytes(exported.serialize())
    _files.write(path, lambda file: file.write(body + hashlib.sha256(body).digest() + MAGIC))


def load_function(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Reads a function that `save_function` wrote.

    Args:
        path: Path of the file.

    Returns:
        A function `(*inputs) -> outputs`, compiled once for every batch size.

    Raises:
        ValueError: The file is missing, damaged or of another kind.
    """
    from jax import export

    try:
        file = Path(path).read_bytes()
    except (OSError, TypeError) as error:
        raise ValueError(f"path: {str(path)!r} can't be read as a function: {error}") from None
    body, digest = file[: -DIGEST - len(MAGIC)], file[-DIGEST - len(MAGIC) : -len(MAGIC)]
    if not file.endswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        raise ValueError(
            f"path: {str(path)!r} can't be read as a function: its checksum differs: it is of "
            "another kind, damaged or truncated"
        )
    return jax.jit(export.deserialize(bytearray(body)).call)


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def batch_remedy(reason: str) -> str:
    """Advice for a function that fails for a symbolic batch size alone, inside an error message."""
    known = "write x.shape[0] instead of len(x), or " if "_DimExpr" in reason else ""
    return f" for any batch size; {known}fix the size with dynamic_batch=False"


def _check_platforms(platforms: Any) -> None:
    """Raises a ValueError for anything but None or names of platforms."""
    if platforms is None:
        return
    known = (*PLATFORMS, jax.default_backend())
    names = platforms if isinstance(platforms, (list, tuple)) else ()
    if not names or not all(isinstance(x, str) and x in known for x in names):
        raise ValueError(
            f"platforms must be a list of names among {', '.join(PLATFORMS)}, or None for that of "
            f"this process, got {_text.shown(platforms)}"
        )


def input_shapes(inputs: tuple[Any, ...], batch: str | None) -> tuple[Any, ...]:
    """Shapes of inputs, with a symbolic first axis.

    Args:
        inputs: Pytrees of arrays or shapes.
        batch: Name of the symbolic size; None to keep the sizes.
    """
    from jax import export

    size = export.symbolic_shape(batch)[0] if batch else None

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        x = jax.eval_shape(lambda: x) if not hasattr(x, "shape") else x
        known = tuple(x.shape)
        return jax.ShapeDtypeStruct((size, *known[1:]) if batch and known else known, x.dtype)

    return jax.tree.map(shape, inputs)
