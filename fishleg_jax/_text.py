"""One-line reprs for values that hold functions and arrays of any size."""

import reprlib
from typing import Any

import jax
import numpy as np

LONGEST = 100  # maximum number of characters per field


def one_line(value: Any) -> str:
    """Repr of a NamedTuple with a summary of every field: `Name(field=summary, ...)`.

    A closure of the library is shown by the name of its field alone.

    Args:
        value: A NamedTuple; its arrays may be traced, donated or sharded.

    Returns:
        One line without array entries.

    Example:
        >>> import jax.numpy as jnp
        >>> from typing import NamedTuple
        >>> class State(NamedTuple):
        ...     count: jax.Array
        ...     masks: dict
        >>> one_line(State(jnp.array(3), {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}))
        'State(count=3, masks={2 arrays, 9 numbers})'
    """
    cells = []
    for name, field in zip(value._fields, value, strict=True):
        shown = summary(field)
        cells.append(name if callable(field) and not shown else f"{name}={shown}")
    return f"{type(value).__name__}({', '.join(cells)})"


def by_maker(value: Any) -> str:
    """Repr of a NamedTuple of closures: the function that built it, and the optional fields set.

    Args:
        value: A NamedTuple whose first field is a closure of the function that built it.

    Returns:
        One line, such as `InverseFisher(kfac, updates=None, product, restrict)`.
    """
    qualified = getattr(value[0], "__qualname__", "")
    maker = qualified.partition(".<locals>")[0].lstrip("_")
    if not _is_closure(value[0]):
        return one_line(value)
    cells = [maker]
    for name, default in value._field_defaults.items():
        field = getattr(value, name)
        if callable(field):
            cells.append(name)
        elif not (field is default or field is None):
            cells.append(f"{name}={summary(field)}")
    return f"{type(value).__name__}({', '.join(cells)})"


def shown(value: Any) -> str:
    """Repr of what a user gave, for an error message: one line, whatever the value holds.

    Args:
        value: Any object.

    Returns:
        The name of a function or a class; else the repr, with arrays by dtype and shape and with
        only the first entries of long containers, or the summary where that is long still.

    Example:
        >>> import jax.numpy as jnp
        >>> shown([(jnp.ones((8, 3)), jnp.zeros(8))]), shown(max), shown(jnp.array(0.5))
        ('[(float32[8,3], float32[8])]', 'the function max', 'float32(0.5)')
    """
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= 2 * LONGEST else summary(value)


class _Short(reprlib.Repr):
    """Short reprs, also of arrays and functions inside of containers."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 4, 6, 6, 4
        self.maxstring = self.maxother = self.maxlong = LONGEST

    def repr1(self, value: Any, level: int) -> str:
        """Repr of a value or an entry."""
        if _is_array(value):
            return _with_type(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            own = type(value).__module__.startswith("fishleg_jax")
            return repr(value) if own else one_line(value)
        name = getattr(value, "__name__", None)
        if callable(value) and isinstance(name, str):
            return f"the {'class' if isinstance(value, type) else 'function'} {name}"
        return super().repr1(value, level)


_SHORT = _Short()


def summary(value: Any) -> str:
    """Summarises a field: a number as it is, an array by dtype and shape, a tree by its size.

    Args:
        value: Any object.

    Returns:
        The summary; empty for a closure of the library.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else value[: LONGEST - 3] + "...")
    if _is_array(value):
        return _array(value)
    if callable(value):
        return "" if _is_closure(value) else _name(value)
    if type(value) is dict and value and not jax.tree.leaves(value):
        return "{0 arrays}"  # such as coordinates where nothing is learned
    leaves = [x for x in jax.tree.leaves(value) if _is_array(x)]
    if leaves:
        numbers = sum(int(np.prod(x.shape, dtype=np.int64)) for x in leaves)
        inside = f"{_counted(len(leaves), 'array')}, {_counted(numbers, 'number')}"
        if type(value) in (dict, list, tuple):
            return f"{{{inside}}}"
        return f"{type(value).__name__}({inside})"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{type(value).__name__}(...)"


def _counted(number: int, noun: str) -> str:
    """Number with its noun, in the plural except for 1."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _is_array(value: Any) -> bool:
    """Whether a value has a shape and a dtype: arrays, tracers and `jax.ShapeDtypeStruct`."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)


def _array(value: Any) -> str:
    """Summarises an array: a single readable number by its value, others by dtype and shape."""
    if _is_readable(value) and value.size == 1:
        number = np.asarray(value).item()
        return f"{number:.6g}" if isinstance(number, float) else repr(number)
    return _type(value)


def _with_type(value: Any) -> str:
    """Array by dtype and shape; a scalar also by its value, as an error may be about its type."""
    if _is_readable(value) and value.shape == ():
        return f"{value.dtype.name}({np.asarray(value).item()!r})"
    return _type(value)


def _type(value: Any) -> str:
    """Dtype and shape of an array, also of another library whose dtypes have no names."""
    dtype = getattr(value.dtype, "name", value.dtype)
    return f"{dtype}[{','.join(map(str, value.shape))}]"


def _is_readable(value: Any) -> bool:
    """Whether the numbers of an array are known, here and now."""
    return isinstance(value, (np.generic, np.ndarray)) or (
        isinstance(value, jax.Array)
        and not isinstance(value, jax.core.Tracer)
        and not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
        and value.is_fully_addressable
        and not value.is_deleted()
    )


def _is_closure(value: Any) -> bool:
    """Whether a value is a closure built by one of the library's functions."""
    own = str(getattr(value, "__module__", "")).partition(".")[0] == "fishleg_jax"
    return own and ".<locals>" in getattr(value, "__qualname__", "")


def _name(function: Any) -> str:
    """Name of a function or of another callable."""
    inner = getattr(function, "func", function)  # of a functools.partial
    name = getattr(inner, "__qualname__", None) or type(inner).__name__
    return str(name).replace("<locals>.", "")
