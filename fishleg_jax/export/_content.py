"""What a file of parameters holds, whatever its format."""

from typing import Any, NamedTuple

import numpy as np


class Content(NamedTuple):
    """Parameters, masks and metadata by name.

    Attributes:
        arrays: Parameters by key path, C-contiguous and little-endian.
        masks: Booleans by key path, of the shapes of the parameters; None without masks.
        structure: Structure of the tree, see `_structure`; None in a file of another program.
        metadata: Strings by name.
    """

    arrays: dict[str, np.ndarray]
    masks: dict[str, np.ndarray] | None
    structure: Any
    metadata: dict[str, str]


def contiguous(array: Any) -> np.ndarray:
    """Copies an array unless it is C-contiguous and little-endian; keeps the shape `()`."""
    array = np.asarray(array, order="C")
    if array.dtype.byteorder == ">" or array.dtype.str[0] == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype of a name such as `float32` or `bfloat16`.

    Raises:
        TypeError: The name is unknown.
    """
    import ml_dtypes  # noqa: F401  NumPy knows bfloat16 and its like by this import

    return np.dtype(name)
