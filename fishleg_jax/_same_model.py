"""Equality of models: identical functions, or functions built twice from the same parts."""

import functools
import types
from typing import Any

import jax
import numpy as np

from fishleg_jax._devices import mesh
from fishleg_jax.likelihoods import Likelihood
from fishleg_jax.model import Model

# attributes that identify code, independent of its position in a file
CODE = (
    "co_code",
    "co_names",
    "co_freevars",
    "co_cellvars",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_flags",
)


def check_same_model(estimated: Model | None, model: Model, arrays: Any) -> None:
    """Raises a ValueError if an estimator was built for another model than the one to prune.

    Args:
        estimated: Model of the estimator; None for an estimator without a model.
        model: Model to prune.
        arrays: Weights or batches; under Explicit axes models are not compared, because the
            estimator's may be a version that does not name axes.
    """
    if estimated is None or estimated is model or mesh.explicit_mesh(arrays) is not None:
        return
    for field in Model._fields:
        one, other = getattr(estimated, field), getattr(model, field)
        if not same(one, other):
            names = [_name(x) for x in (one, other)]
            if names[0] == names[1]:
                names[1] += " with other values inside"
            raise ValueError(
                f"estimator must be built for the model to prune, but its {field} is {names[0]} "
                f"and that of the model is {names[1]}"
            )


def same(one: Any, other: Any, seen: frozenset = frozenset()) -> bool:
    """Whether two functions, or objects that they hold, are interchangeable.

    Functions are if their code is equal, and everything it refers to: defaults, closed-over values,
    and the globals of one module.  `jax.jit` and `remat` around a function are ignored.

    Args:
        one: Function, array, container or any other object.
        other: Object to compare with.
        seen: Pairs of ids already being compared by outer calls.
    """
    one, other = _unwrapped(one), _unwrapped(other)
    pair = id(one), id(other)
    if one is other or pair in seen:
        return True
    # compare what the objects hold, by type
    deeper = functools.partial(_all_same, seen=seen | {pair})
    if type(one) is not type(other):
        return False
    if isinstance(one, types.FunctionType):
        closures = [list(map(_contents, f.__closure__ or ())) for f in (one, other)]
        return (
            _same_code(one.__code__, other.__code__)
            and one.__globals__ is other.__globals__
            and deeper(_defaults(one), _defaults(other))
            and deeper(*closures)
        )
    if isinstance(one, types.MethodType):
        return deeper([one.__func__, one.__self__], [other.__func__, other.__self__])
    if isinstance(one, functools.partial):
        parts = [[f.func, f.args, f.keywords] for f in (one, other)]
        return deeper(*parts)
    if isinstance(one, dict):
        return one.keys() == other.keys() and deeper([*one.values()], [other[k] for k in one])
    if isinstance(one, (tuple, list)):
        return deeper(one, other)
    if isinstance(one, jax.core.Tracer):
        return False  # distinct tracers have unknown values
    try:
        if isinstance(one, (np.ndarray, jax.Array)):
            return one.dtype == other.dtype and bool(np.array_equal(one, other))
        return bool(one == other)
    except Exception:  # a user's class may raise anything
        return False


def _all_same(one: Any, other: Any, seen: frozenset) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(same(a, b, seen) for a, b in pairs)


def _unwrapped(x: Any) -> Any:
    """Returns the function inside `jax.jit` and `remat`, which do not change its results."""
    while getattr(x, "is_remat", False) is True or _is_jitted(x):
        x = x.__wrapped__
    return x


def _is_jitted(x: Any) -> bool:
    own = isinstance(x, types.FunctionType)
    return not own and hasattr(x, "lower") and hasattr(x, "__wrapped__")


def _defaults(function: types.FunctionType) -> list:
    return [function.__defaults__, function.__kwdefaults__]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: the name is not bound yet
        return None


def _same_code(one: types.CodeType, other: types.CodeType) -> bool:
    if any(getattr(one, name) != getattr(other, name) for name in CODE):
        return False
    if len(one.co_consts) != len(other.co_consts):
        return False
    return all(
        _same_code(a, b)
        if isinstance(a, types.CodeType) and isinstance(b, types.CodeType)
        else type(a) is type(b) and a == b
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def _name(x: Any) -> str:
    """Name and line of a function; for a likelihood, the name of its constructor."""
    if isinstance(x, Likelihood):
        return _name(x.negative_log_likelihood).split(".")[0].lstrip("_")
    inner = _unwrapped(x)
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return name if code is None else f"{name} (line {code.co_firstlineno})"
