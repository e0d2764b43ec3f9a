"""Files and functions for networks after pruning: parameters on disk, ONNX, StableHLO, BCSR.

Needs the extra `export` (`pip install "fishleg-jax[export]"`), whose packages are imported when a
function needs them.
"""

from fishleg_jax.export._functions import load_function, save_function
from fishleg_jax.export._onnx import to_onnx
from fishleg_jax.export._params import Loaded, load_params, save_params
from fishleg_jax.export._sparse import SparseApply, SparseLayer, sparse_apply
from fishleg_jax.export._sparse_times import MatmulTimes, measure_sparse_matmul
from fishleg_jax.export._two_four import TwoFourLayout, two_four_layout

__all__ = [
    "Loaded",
    "MatmulTimes",
    "SparseApply",
    "SparseLayer",
    "TwoFourLayout",
    "load_function",
    "load_params",
    "measure_sparse_matmul",
    "save_function",
    "save_params",
    "sparse_apply",
    "to_onnx",
    "two_four_layout",
]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
