"""Counts whether the kernels of an ONNX file are 2:4 along the axis that TensorRT asks for."""

import os
from typing import NamedTuple

import numpy as np

from fishleg_jax import _text
from fishleg_jax.export import _extra
from fishleg_jax.export._kernels import graphs, kernel_axes, names_from_inputs, nodes

GROUP, KEPT = 4, 2


class TwoFourLayout(NamedTuple):
    """Groups of four in one kernel of an ONNX file.

    Attributes:
        name: Name of the initializer, or of the computed value that the operator reads.
        operator: `Conv`, `Gemm` or `MatMul`.
        shape: Shape of the initializer; `()` if the kernel is computed.
        axis: Axis that the operator sums over: input channels of a convolution (1 of OIHW), K of a
            product (K, N).
        groups: Number of complete groups of four along that axis.
        dense_groups: Number of those with more than two weights that are not zero.
        left: Number of weights behind the last complete groups.
        computed: Whether the kernel is computed when the file runs, such as by a transposition of
            an initializer.  Groups of such a kernel are not counted, and it is not 2:4.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    axis: int
    groups: int
    dense_groups: int
    left: int
    computed: bool = False

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
        One row for each kernel of each Conv, Gemm or MatMul, in the order of the operators, those
        in loops and branches included.  A kernel that is computed when the file runs has a row with
        `computed` True and without counts, such as one that is transposed and has another reader,
        or one that a loop hands on.  A product of two arrays that depend on the inputs, as in
        attention, has no row.

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
    stored = {x.name: x for part in graphs(graph) for x in part.initializer}
    constants = [x for x in nodes(graph) if x.op_type == "Constant"]
    stored |= {x.output[0]: a.t for x in constants for a in x.attribute if a.name == "value"}
    from_inputs = names_from_inputs(graph)
    rows = []
    for node in nodes(graph):
        for index, axis in kernel_axes(node):
            name = node.input[index]
            if name not in stored:
                if node.op_type == "Conv" or name not in from_inputs:
                    rows.append(TwoFourLayout(name, node.op_type, (), axis, 0, 0, 0, computed=True))
            elif len(stored[name].dims) >= 2:
                array = onnx.numpy_helper.to_array(stored[name])
                rows.append(_count(name, node.op_type, array, axis % array.ndim))
    return tuple(rows)


def _count(name: str, operator: str, array: np.ndarray, axis: int) -> TwoFourLayout:
    marked = np.moveaxis(array != 0, axis, -1)
    size = marked.shape[-1]
    left = size % GROUP
    groups = marked[..., : size - left].reshape(-1, GROUP).sum(axis=-1)
    dense = int((groups > KEPT).sum())
    behind = left * (marked.size // size)
    return TwoFourLayout(name, operator, array.shape, axis, len(groups), dense, behind)
