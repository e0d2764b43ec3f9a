"""Trained weights from and to npz files: in torch's layout and names, or in our own."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.specs import Spec
from experiments.running import files
from fishleg_jax.pruning.masks.files import read_npz

# our leaf names -> torch's
TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
IGNORED = "num_batches_tracked"  # torch counts batches for batch norm; nothing here needs it


def _key_paths(tree: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _torch_name(key: str, entries: set[str]) -> str:
    # params/layer1_0/conv1/kernel -> layer1.0.conv1.weight, or without its .weight
    *modules, leaf = key.split("/")[1:]
    module = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules)
    name = f"{module}.{TORCH_LEAVES.get(leaf, leaf)}"
    return module if leaf == "kernel" and name not in entries and module in entries else name


def _from_torch(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    return array.T if array.ndim == 2 else array


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1]


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        return read_npz(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is not an npz file of arrays") from error


def load(path: str | Path, spec: Spec) -> tuple[Any, Any]:
    """Reads the trained weights of a model.

    Args:
        path: an npz file, either written by `save`, or with torch's names and layouts: dense
            kernels (out, in), convolutions (out, in, height, width).
        spec: the model.

    Returns:
        Its parameters and its constants, as float32.

    Raises:
        ValueError: no such file, not an npz file, an entry that is missing, unknown, of the wrong
            shape, or not finite.
    """
    path = Path(path)
    entries = _read(path)
    params, constants = jax.eval_shape(spec.init, jax.random.key(0))
    expected = {"params": params, "constants": constants}
    own = any(name.startswith("params/") for name in entries)
    leaves = []
    for key, leaf in zip(_key_paths(expected), jax.tree.leaves(expected), strict=True):
        name = key if own else _torch_name(key, set(entries))
        shape = leaf.shape if own else _torch_shape(leaf.shape)
        where = f"checkpoint {path} for {spec.name}: entry {name}"
        if name not in entries:
            raise ValueError(f"{where} is missing, expected one of shape {shape}")
        array = entries.pop(name)
        if array.shape != shape:
            raise ValueError(f"{where} has shape {array.shape}, expected {shape}")
        if not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
            raise ValueError(f"{where} is of type {array.dtype}, expected finite floats")
        leaves.append(jnp.asarray(array if own else _from_torch(array), jnp.float32))
    unknown = [name for name in entries if not name.endswith(IGNORED)]
    if unknown:
        raise ValueError(
            f"checkpoint {path} for {spec.name}: entry {unknown[0]} of shape "
            f"{entries[unknown[0]].shape} is unknown, expected only the model's own weights"
        )
    tree = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    return tree["params"], tree["constants"]


def save(path: str | Path, params: Any, constants: Any) -> Path:
    """Writes a model's weights as a flat npz file, named by key path.

    Args:
        path: where the file shall be.
        params: the parameters.
        constants: the constants; may be empty.

    Returns:
        The path.
    """
    tree = {"params": params, "constants": constants}
    arrays = dict(zip(_key_paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))
    return files.write(Path(path), lambda beside: np.savez(beside, **arrays))
