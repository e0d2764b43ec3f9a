"""The packed format: for every array a bitmask and its values that are not zero, compressed.

docs/guide/packed.md describes it, with a reader of 20 lines.
"""

import hashlib
import json
from typing import Any

import numpy as np

from fishleg_jax.export import _extra
from fishleg_jax.export._content import Content, dtype_of

MAGIC = b"FLJPACK1"
LEVEL = 9  # of zstandard
DIGEST = hashlib.sha256().digest_size


def encode(content: Content) -> bytes:
    """Returns the file of some parameters.

    Raises:
        ImportError: zstandard is not installed.
        ValueError: An array has a dtype that is not one of numbers.
    """
    zstandard = _extra.package("zstandard", "save_params(packed=True)")
    tensors, bits, values = [], [], []
    for name, array in content.arrays.items():
        if array.dtype.hasobject or array.dtype.names or array.dtype.kind in "SUMm":
            raise ValueError(f"params: {name!r} must be an array of numbers, got {array.dtype}")
        # one row of bytes for each value, the most significant one first
        raw = array.reshape(-1, 1).view(np.uint8)[:, ::-1]
        kept = raw.any(axis=1)  # of bits: -0.0 is kept
        bits.append(np.packbits(kept))
        values.append(raw[kept])
        mask = None if content.masks is None else content.masks[name].reshape(-1)
        stored = mask is not None and not np.array_equal(mask, kept)
        if stored:
            bits.append(np.packbits(mask))
        kind = "none" if mask is None else "stored" if stored else "nonzero"
        shape = list(array.shape)
        tensors.append({"name": name, "dtype": array.dtype.name, "shape": shape, "mask": kind})
    header = {
        "tensors": tensors,
        "structure": content.structure,
        "metadata": dict(sorted(content.metadata.items())),
    }
    # values byte by byte: exponents compress, and would not between the bytes of mantissas
    width = max((rows.shape[1] for rows in values), default=0)
    planes = [[rows[:, j] for rows in values if rows.shape[1] > j] for j in range(width)]
    text = json.dumps(header, separators=(",", ":")).encode()
    sections = [text, *(b"".join(x.tobytes() for x in part) for part in [bits, *planes])]
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    body = MAGIC
    for section in map(compressor.compress, sections):
        body += len(section).to_bytes(8, "little") + section
    return body + hashlib.sha256(body).digest()


def decode(file: bytes) -> Content:
    """Reads a packed file.

    Raises:
        ImportError: zstandard is not installed.
        ValueError: The file is damaged.
    """
    zstandard = _extra.package("zstandard", "load_params of a packed file")
    body, digest = file[:-DIGEST], file[-DIGEST:]
    if not body.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum differs: it is damaged or truncated")
    sections, at = [], len(MAGIC)
    while at < len(body):
        size = int.from_bytes(body[at : at + 8], "little")
        sections.append(zstandard.ZstdDecompressor().decompress(body[at + 8 : at + 8 + size]))
        at += 8 + size
    header, bits, *planes = sections
    header = json.loads(header)
    reader = _Reader(bits, planes)
    arrays, masks = {}, {}
    for tensor in header["tensors"]:
        name = tensor["name"]
        arrays[name], kept = reader.array(tensor)
        if tensor["mask"] != "none":
            stored = tensor["mask"] == "stored"
            masks[name] = reader.mask(tensor["shape"]) if stored else kept.reshape(tensor["shape"])
    return Content(arrays, masks or None, header["structure"], header["metadata"])


class _Reader:
    """Reads bitmasks and values one after the other."""

    def __init__(self, bits: bytes, planes: list[bytes]):
        self.bits, self.planes = np.frombuffer(bits, np.uint8), planes
        self.bit, self.at = 0, [0] * len(planes)

    def mask(self, shape: list[int]) -> np.ndarray:
        """Next bitmask, of a shape."""
        size = int(np.prod(shape, dtype=np.int64))
        begin, self.bit = self.bit, self.bit + -(-size // 8)
        return np.unpackbits(self.bits[begin : self.bit], count=size).astype(bool).reshape(shape)

    def array(self, tensor: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Next array, and which of its values are stored."""
        dtype = dtype_of(tensor["dtype"])
        kept = self.mask(tensor["shape"]).reshape(-1)
        raw, count = np.zeros((kept.size, dtype.itemsize), np.uint8), int(kept.sum())
        for j in range(dtype.itemsize):
            begin, self.at[j] = self.at[j], self.at[j] + count
            raw[kept, -1 - j] = np.frombuffer(self.planes[j], np.uint8, count, begin)
        return raw.reshape(-1).view(dtype).reshape(tensor["shape"]), kept
