"""Masks on disk: one compressed npz file, one bit a weight, leaves by key path."""

import os
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

from fishleg_jax import _files, _tree
from fishleg_jax._checks.arrays import check_untraced
from fishleg_jax._devices import placement


def save_masks(path: str | os.PathLike[str], masks: Any) -> None:
    """Writes masks to a file, atomically.

    Args:
        path: Path of the file; it is written beside and then renamed, replacing an existing one.
        masks: Pytree of booleans.

    Raises:
        ValueError: A leaf is not boolean, such as weights; traced masks; a folder that does not
            exist.

    Example:
        >>> import tempfile, jax.numpy as jnp, fishleg_jax as flj
        >>> masks = {"kernel": jnp.array([[True, False]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flj.save_masks(f"{folder}/masks.npz", masks)
        ...     flj.load_masks(f"{folder}/masks.npz", like=masks)
        {'kernel': Array([[ True, False]], dtype=bool)}
    """
    check_untraced("return them from the compiled function, and save them afterwards", masks=masks)
    arrays, named = {}, _tree.named_leaves(masks)
    _tree.check_names(named)
    for name, mask in named:
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise ValueError(f"masks: {name!r} must be an array of booleans, got {mask.dtype}")
        arrays[f"{name}:bits"], arrays[f"{name}:shape"] = np.packbits(mask), np.array(mask.shape)
    _files.write(path, lambda file: np.savez_compressed(file, **arrays))


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz file.

    Args:
        path: Path of the file.

    Raises:
        ValueError: The file is missing, of another kind, or broken.
    """
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error


def load_masks(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads masks that `save_masks` wrote.

    Args:
        path: Path of the file.
        like: Parameters, or any pytree of their structure and shapes.

    Returns:
        A pytree of booleans of that structure, sharded like the parameters.

    Raises:
        ValueError: The file does not contain masks, or its leaves or shapes differ.
    """
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise ValueError(f"path: {str(path)!r} is not a file of masks: {error}") from None
    # Check that the file holds masks of these leaves.
    named = _tree.named_leaves(like)
    found = {name.rpartition(":")[0] for name in arrays}
    if set(arrays) != {f"{name}:{part}" for name in found for part in ("bits", "shape")}:
        raise ValueError(f"path: {str(path)!r} is not a file of masks: it holds other arrays")
    if found != {name for name, _ in named}:
        raise ValueError(
            f"path: {str(path)!r} holds masks of {', '.join(sorted(found)) or 'nothing'}, "
            f"but the parameters are {', '.join(name for name, _ in named)}"
        )
    # Unpack the bits leaf by leaf.
    leaves = []
    for name, leaf in named:
        shape = tuple(int(n) for n in arrays[f"{name}:shape"])
        if shape != np.shape(leaf):
            raise ValueError(
                f"path: in {str(path)!r} the mask of {name!r} has shape {shape}, "
                f"but the parameter has {np.shape(leaf)}"
            )
        packed, size = arrays[f"{name}:bits"], int(np.prod(shape))
        if packed.size != -(-size // 8):
            raise ValueError(f"path: in {str(path)!r} the mask of {name!r} is truncated")
        bits = np.unpackbits(packed, count=size)
        leaves.append(jax.numpy.asarray(bits.astype(bool).reshape(shape)))
    return placement.like(jax.tree.unflatten(jax.tree.structure(like), leaves), like)
