"""The current mesh, and the axes of it over which the parameters are sharded."""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding

from fishleg_jax._jit import is_traced

P = ParamSpec("P")
R = TypeVar("R")


def sharding_of(x: Any) -> NamedSharding | None:
    """Sharding of an array; None if unknown, as for Auto axes under `jit`."""
    if isinstance(x, jax.core.Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if explicit(sharding.mesh) else None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def explicit_mesh(tree: Any) -> Any:
    """Mesh with Explicit axes over which any array of a tree is sharded; None without one."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            mesh = jax.typeof(x).sharding.mesh
            if explicit(mesh):
                return mesh
    return None


def automatic_mesh(tree: Any) -> Any:
    """Mesh with Auto axes and several devices that is set or that holds an array; None without one.

    Under `jit` an array still reports its mesh, though not its sharding.
    """
    known = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    meshes = [jax.sharding.get_abstract_mesh(), *known]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or set(mesh.axis_types) != {AxisType.Auto} or mesh.size == 1:
        return None
    return mesh


def in_mesh_of_params(function: Callable[P, R]) -> Callable[P, R]:
    """Sets the mesh of the parameters, the second argument, while a host function runs.

    This lets a model name axes.  Under a user's `jit` no mesh can be set, and theirs applies.  The
    signature of the function is kept, for type checkers as well.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        params = kwargs["params"] if "params" in kwargs else args[1] if len(args) > 1 else ()
        known = [s for s in map(sharding_of, jax.tree.leaves(params)) if s is not None]
        mesh = known[0].mesh if known else None
        if mesh is None and is_traced(params):  # sharding unknown
            return function(*args, **kwargs)
        free = jax.sharding.get_abstract_mesh().empty and isinstance(mesh, jax.sharding.Mesh)
        with contextlib.ExitStack() as known_here:
            if free:
                with contextlib.suppress(ValueError):  # raised under a jit
                    known_here.enter_context(jax.set_mesh(mesh))
            axes = () if mesh is None else axes_of(known, mesh)
            known_here.enter_context(parameters_over(axes))
            return function(*args, **kwargs)

    return run


# Axes over which the current parameters are sharded.  Under Auto axes a function traced for some
# axes may be reused for others: the compiler then moves more data, but the numbers are the same.
_PARAMETER_AXES: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "axes", default=None
)


@contextlib.contextmanager
def parameters_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Context that sets the axes over which the current parameters are sharded."""
    before = _PARAMETER_AXES.set(axes)
    try:
        yield
    finally:
        _PARAMETER_AXES.reset(before)


def parameter_axes() -> tuple[str, ...]:
    """Axes over which the current parameters are sharded; empty if unknown."""
    return _PARAMETER_AXES.get() or ()


def is_unknown() -> bool:
    """Whether the sharding of arrays is unknown: inside a user's own `jit` without a mesh."""
    return _PARAMETER_AXES.get() is None and jax.sharding.get_abstract_mesh().empty


def cutters(lengths: Sequence[int], examples: bool = False) -> tuple[str, ...]:
    """Axes of the current mesh that cut all lengths into the most pieces of equal length."""
    mesh = automatic_mesh(())
    if mesh is None:
        return ()
    usable = mesh.axis_names
    if not examples:
        usable = [name for name in usable if name in parameter_axes()]
    return next(
        (
            names
            for names, parts in choices(usable, mesh)
            if all(length % parts == 0 for length in lengths)
        ),
        (),
    )


def choices(axes: Sequence[str], mesh: Any) -> list[tuple[tuple[str, ...], int]]:
    """All combinations of axes with their number of pieces, sorted from most to fewest."""
    choices = [
        (names, math.prod(mesh.shape[name] for name in names))
        for number in range(1, len(axes) + 1)
        for names in itertools.combinations(axes, number)
    ]
    return sorted((c for c in choices if c[1] > 1), key=lambda choice: -choice[1])


def axes_of(shardings: list[NamedSharding], mesh: Any) -> tuple[str, ...]:
    """Axes of a mesh used by any of the shardings, in the order of the mesh."""
    used = set()
    for sharding in shardings:
        for entry in sharding.spec:
            used |= set(entry) if isinstance(entry, tuple) else {entry}
    return tuple(name for name in mesh.axis_names if name in used)


def explicit(mesh: Any) -> bool:
    """Whether a mesh has Explicit axes."""
    return bool(getattr(mesh, "explicit_axes", ()))
