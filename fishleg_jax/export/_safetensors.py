"""Parameters in the format of safetensors, with a checksum and masks of one bit a weight."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fishleg_jax.export import _extra
from fishleg_jax.export._content import Content, dtype_of

# Keys of our entries in the metadata.  They are two so that a file with a damaged one is not taken
# for the file of another program, which has no checksum.
OWN, CHECKSUM = "fishleg_jax", "fishleg_jax.sha256"
BITS = ":mask"  # ends the names of packed masks
DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def encode(content: Content) -> bytes:
    """Returns the file of some parameters.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: A name or a dtype is one that the format does not have.
    """
    package = _extra.package("safetensors.numpy", "save_params")
    arrays = dict(content.arrays)
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES.values():
            raise ValueError(
                f"params: {name!r} has dtype {array.dtype}, which safetensors does not have; "
                "cast it, or use packed=True"
            )
        if name == "__metadata__":
            raise ValueError("params: safetensors reserves the name '__metadata__'; rename it")
    for name, mask in (content.masks or {}).items():
        if name + BITS in arrays:
            raise ValueError(f"params: {name + BITS!r} is the name of a mask in the file")
        arrays[name + BITS] = np.packbits(mask)
    own = json.dumps({"structure": content.structure, "masks": list(content.masks or ())})
    metadata = {**content.metadata, OWN: own}
    metadata[CHECKSUM] = _digest(arrays, metadata)
    return _with_sorted_metadata(package.save(arrays, metadata))


def decode(file: bytes) -> Content:
    """Reads a file, which may be one of another program.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: The file is damaged, or holds dtypes that NumPy does not have.
    """
    package = _extra.package("safetensors", "load_params")
    try:
        found = package.deserialize(file)
        metadata = _split(file)[0].get("__metadata__", {})
    except (package.SafetensorError, ValueError) as error:
        raise ValueError(str(error)) from None
    arrays = {}
    for name, entry in found:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} has dtype {entry['dtype']}, which NumPy does not have")
        dtype = dtype_of(DTYPES[entry["dtype"]])
        arrays[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    if not {OWN, CHECKSUM} & metadata.keys():
        return Content(arrays, None, None, metadata)
    checksum = metadata.pop(CHECKSUM, None)
    if _digest(arrays, metadata) != checksum:
        raise ValueError("its checksum differs: it is damaged")
    own = json.loads(metadata.pop(OWN))
    masks = {name: _mask(arrays, name) for name in own["masks"]}
    return Content(arrays, masks or None, own["structure"], metadata)


def _mask(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Takes a mask out of the arrays."""
    shape = arrays[name].shape
    bits = arrays.pop(name + BITS)
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Checksum over everything that is read from a file, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def _with_sorted_metadata(file: bytes) -> bytes:
    """Sorts the metadata, which safetensors 0.8.0 writes in random order (its issue 584)."""
    header, data = _split(file)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
