"""Parameters on disk: safetensors, or the packed format for many zeros."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _files, _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax._checks.arrays import check_untraced
from fishleg_jax._devices import placement
from fishleg_jax.export import _packed, _safetensors, _structure
from fishleg_jax.export._content import Content, contiguous
from fishleg_jax.pruning.masks.groups import check_masks


class Loaded(NamedTuple):
    """What `load_params` returns.

    Attributes:
        params: Parameters.
        masks: Pytree of booleans like the parameters; None for a file without masks.
        metadata: Strings by name, as given to `save_params`.
    """

    params: Any
    masks: Any | None
    metadata: dict[str, str]

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


def save_params(
    path: str | os.PathLike[str],
    params: Any,
    masks: Any | None = None,
    metadata: Mapping[str, str] | None = None,
    packed: bool = False,
) -> None:
    """Writes parameters to a file, atomically and with a checksum.

    The default format is that of safetensors, which many programs read; zeros take as much of it as
    other numbers.  The packed format keeps a bit for every weight and the weights that are not
    zero, compressed; its page in the guide has a reader of 20 lines in NumPy.  Negative zeros take
    as much of it as other numbers: `w * mask` in NumPy leaves them where weights were negative,
    `flj.apply_masks` and `masks` here do not.

    Leaves are named by key path, as text.  Dictionary keys that are not strings, such as 0, become
    strings, `"0"`, unless `load_params` gets `like`.

    Args:
        path: Path of the file; it is written beside and then renamed, replacing an existing one.
        params: Pytree of arrays of any dtype of numbers, bfloat16 and float8 included.
        masks: Pytree of booleans like the parameters, kept in the file with one bit a weight or
            less; weights outside the masks are written as zeros.  None for none.
        metadata: Strings by name, such as `{"commit": "40544bc"}`; None for none.
        packed: Whether to write the packed format, False by default.

    Raises:
        ImportError: safetensors, or for the packed format zstandard, is not installed.
        ValueError: A path in a folder that does not exist, two leaves of one key path, a dtype that
            the format does not have, masks of another structure or dtype, traced arrays, or
            metadata other than a dictionary of strings.

    Example:
        >>> import tempfile, jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"fc1": {"kernel": jnp.array([[0.0, 1.5]])}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flj.export.save_params(f"{folder}/net.packed", params, packed=True)
        ...     flj.export.load_params(f"{folder}/net.packed").params
        {'fc1': {'kernel': Array([[0. , 1.5]], dtype=float32)}}
    """
    _files.check_place(path)
    remedy = "return them from the compiled function, and save them afterwards"
    check_untraced(remedy, params=params, masks=masks)
    metadata = _checked_metadata(metadata)
    numbers.check_flag(packed, "packed")
    named = _tree.named_leaves(params)
    _tree.check_names(named)
    own = None
    if masks is not None:
        check_masks(params, masks)
        own = {name: np.asarray(mask) for name, mask in _tree.named_leaves(masks)}
    arrays = {name: _array(name, leaf) for name, leaf in named}
    for name, mask in (own or {}).items():
        arrays[name] = np.where(mask, arrays[name], np.zeros_like(arrays[name]))
    content = Content(arrays, own, _structure.describe(params), metadata)
    file = (_packed if packed else _safetensors).encode(content)
    _files.write(path, lambda handle: handle.write(file))


def load_params(path: str | os.PathLike[str], like: Any | None = None) -> Loaded:
    """Reads parameters that `save_params` wrote, or the safetensors file of another program.

    The whole file is checked before anything is returned.

    Args:
        path: Path of the file; its format is found from its first bytes.
        like: Pytree of the structure, shapes and dtypes of the parameters, such as freshly
            initialised ones or those of `jax.eval_shape`; needed for containers other than
            dictionaries, lists and tuples, and for dictionary keys other than strings.  By default
            those three are restored, with strings as keys (`{0: w}` becomes `{"0": w}`), other
            containers become dictionaries by key path, and a file of another program is a flat
            dictionary.

    Returns:
        Parameters, masks and metadata.  Every number comes back bit for bit.  Leaves are JAX
        arrays, sharded like those of `like`; leaves of 64 bits are NumPy arrays where JAX would
        shorten them (`jax_enable_x64`).

    Raises:
        ImportError: The package that reads the format is not installed.
        ValueError: The file is missing, damaged or of another kind, or differs from `like`.

    Example:
        >>> import tempfile, jax.numpy as jnp, fishleg_jax as flj
        >>> params, masks = {"w": jnp.array([3.0, 2.0])}, {"w": jnp.array([True, False])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flj.export.save_params(f"{folder}/net.safetensors", params, masks, {"seed": "0"})
        ...     flj.export.load_params(f"{folder}/net.safetensors")
        Loaded(params={1 array, 2 numbers}, masks={1 array, 2 numbers}, metadata={'seed': '0'})
    """
    try:
        file = Path(path).read_bytes()
        packed = file.startswith(_packed.MAGIC)
        content = (_packed if packed else _safetensors).decode(file)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"path: {str(path)!r} can't be read as parameters: {error}") from None
    if like is None:
        return Loaded(_tree_of(content.arrays, content), _masks(content), content.metadata)
    _check_like(path, content, like)
    names, structure = [name for name, _ in _tree.named_leaves(like)], jax.tree.structure(like)
    build = lambda arrays: placement.like(  # noqa: E731
        structure.unflatten(map(_leaf, map(arrays.get, names))), like
    )
    masks = None if content.masks is None else build(content.masks)
    return Loaded(build(content.arrays), masks, content.metadata)


def _array(name: str, leaf: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.extended):
        raise ValueError(
            f"params: {name!r} must be an array of numbers, got a random key: save its "
            "jax.random.key_data"
        )
    array = contiguous(leaf)
    if array.dtype.hasobject or array.dtype.names or array.dtype.kind in "SUMm":
        raise ValueError(f"params: {name!r} must be an array of numbers, got {array.dtype}")
    return array


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ValueError(
            'metadata must be a dictionary of strings, such as {"seed": "0"}, or None, got '
            f"{_text.shown(metadata)}"
        )
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value):
            raise ValueError(
                "metadata must map strings to strings, without lone surrogates, got "
                f"{_text.shown(key)}: {_text.shown(value)}"
            )
        if key in (_safetensors.OWN, _safetensors.CHECKSUM):
            raise ValueError(f"metadata: the name {key!r} is the library's own; use another")
    return dict(metadata)


def _is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can encode, which lone surrogates are not."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _leaf(array: np.ndarray) -> Any:
    """Array of JAX, or of NumPy where JAX would change the dtype."""
    kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jax.numpy.asarray(array) if kept else array


def _tree_of(arrays: Mapping[str, np.ndarray], content: Content) -> Any:
    leaves = {name: _leaf(array) for name, array in arrays.items()}
    return leaves if content.structure is None else _structure.restore(content.structure, leaves)


def _masks(content: Content) -> Any | None:
    return None if content.masks is None else _tree_of(content.masks, content)


def _check_like(path: Any, content: Content, like: Any) -> None:
    """Raises a ValueError unless the leaves are those of `like`, in shape and dtype.

    Dtypes are compared by name: files are little-endian, whatever the byte order of `like`.
    """
    named = _tree.named_leaves(like)
    names = [name for name, _ in named]
    if set(names) != set(content.arrays):
        raise ValueError(
            f"path: {str(path)!r} holds {', '.join(content.arrays) or 'nothing'}, but like has "
            f"{', '.join(names) or 'nothing'}"
        )
    for name, leaf in named:
        array = content.arrays[name]
        if not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        if (leaf.shape, leaf.dtype.name) != (array.shape, array.dtype.name):
            raise ValueError(
                f"path: in {str(path)!r} {name!r} is {array.dtype}{list(array.shape)}, but like "
                f"has {leaf.dtype.name}{list(leaf.shape)}"
            )
