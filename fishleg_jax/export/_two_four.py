"""Counts whether the kernels of an ONNX file are 2:4 along the axis that TensorRT asks for."""

import os
from typing import Any, NamedTuple

import numpy as np

from fishleg_jax import _text
from fishleg_jax.export import _extra

GROUP, KEPT = 4, 2


class TwoFourLayout(NamedTuple):
    """Groups of four in one kernel of an ONNX file.

    Attributes:
        name: Name of the initializer.
        operator: `Conv`, `Gemm` or `MatMul`.
        shape: Shape of the initializer.
        axis: Axis that the operator sums over: input channels of a convolution (1 of OIHW), K of a
            product (K, N).
        groups: Number of complete groups of four along that axis.
        dense_groups: Number of those with more than two weights that are not zero.
        left: Number of weights behind the last complete groups.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    axis: int
    groups: int
    dense_groups: int
    left: int

    @property
    def is_two_four(self) -> bool:
        """Whether every group of four has at most two non-zeros, and none is incomplete."""
        return self.groups > 0 and self.dense_groups == 0 and self.left == 0

    def __repr__(self) -> str:
        """One line."""
        return _text.one_line(self)


def two_four_layout(path: str | os.PathLike[str]) -> tuple[TwoFourLayout, ...]:
    """Counts the groups of four in every kernel of an ONNX file.

    TensorRT takes its 2:4 kernels only where, along the axis that is summed over, at most two of
    each four consecutive weights are not zero.

    Args:
        path: Path of an ONNX file.

    Returns:
        One row for each initializer that is the kernel of a Conv, Gemm or MatMul, in the order of
        the operators.

    Raises:
        ImportError: onnx is not installed.
        ValueError: The file is missing or not an ONNX file.

    References:
        NVIDIA TensorRT documentation, "Sparsity".
    """
    onnx = _extra.package("onnx", "two_four_layout")
    try:
        graph = onnx.load(os.fspath(path)).graph
    except Exception as error:  # protobuf's own, of no common base over versions
        raise ValueError(f"path: {str(path)!r} can't be read as ONNX: {error}") from None
    kernels = {x.name: x for x in graph.initializer}
    rows = []
    for node in graph.node:
        for index, axis in _kernel_axes(node):
            kernel = kernels.get(node.input[index])
            if kernel is not None and len(kernel.dims) >= 2:
                array = onnx.numpy_helper.to_array(kernel)
                rows.append(_count(kernel.name, node.op_type, array, axis % array.ndim))
    return tuple(rows)


def _kernel_axes(node: Any) -> list[tuple[int, int]]:
    """Inputs of an operator that may be kernels, each with the axis that is summed over."""
    flags = {x.name: x.i for x in node.attribute if x.name in ("transA", "transB")}
    if node.op_type == "Conv":
        return [(1, 1)]
    if node.op_type == "MatMul":
        return [(0, -1), (1, -2)]
    if node.op_type == "Gemm":
        return [(0, 0 if flags.get("transA") else 1), (1, 1 if flags.get("transB") else 0)]
    return []


def _count(name: str, operator: str, array: np.ndarray, axis: int) -> TwoFourLayout:
    marked = np.moveaxis(array != 0, axis, -1)
    size = marked.shape[-1]
    left = size % GROUP
    groups = marked[..., : size - left].reshape(-1, GROUP).sum(axis=-1)
    dense = int((groups > KEPT).sum())
    behind = left * (marked.size // size)
    return TwoFourLayout(name, operator, array.shape, axis, len(groups), dense, behind)
