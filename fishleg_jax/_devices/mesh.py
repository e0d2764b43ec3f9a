"""The mesh at hand, and the axes of it over which the parameters are spread."""

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
    """How an array is spread, where that is known: of Auto axes it is not under `jit`."""
    if isinstance(x, jax.core.Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if explicit(sharding.mesh) else None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def explicit_mesh(tree: Any) -> Any:
    """The mesh with Explicit axes over which any array of a tree is spread; None without one."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            mesh = jax.typeof(x).sharding.mesh
            if explicit(mesh):
                return mesh
    return None


def automatic_mesh(tree: Any) -> Any:
    """The mesh of Auto axes, and more devices than one, that is set or that an array lies on.

    None where there is none; under `jit`, too, an array tells on which mesh it is, though not how.
    """
    known = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    meshes = [jax.sharding.get_abstract_mesh(), *known]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or set(mesh.axis_types) != {AxisType.Auto} or mesh.size == 1:
        return None
    return mesh


def in_mesh_of_params(function: Callable[P, R]) -> Callable[P, R]:
    """Sets the mesh of the parameters, its second argument, for a function on the host.

    So that a model may name axes.  Under a `jit` of others no mesh can be set: theirs counts.  The
    signature stays that of the function, for type checkers as well.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        params = kwargs["params"] if "params" in kwargs else args[1] if len(args) > 1 else ()
        known = [s for s in map(sharding_of, jax.tree.leaves(params)) if s is not None]
        mesh = known[0].mesh if known else None
        if mesh is None and is_traced(params):  # nothing can be said
            return function(*args, **kwargs)
        free = jax.sharding.get_abstract_mesh().empty and isinstance(mesh, jax.sharding.Mesh)
        with contextlib.ExitStack() as known_here:
            if free:
                with contextlib.suppress(ValueError):  # that it is under a jit
                    known_here.enter_context(jax.set_mesh(mesh))
            axes = () if mesh is None else axes_of(known, mesh)
            known_here.enter_context(spread_over(axes))
            return function(*args, **kwargs)

    return run


# Axes over which the parameters at hand are spread.  Under Auto axes what was traced for some may
# be found again for others: then the compiler has more to move, and the numbers are the same.
_PARAMETER_AXES: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "axes", default=None
)


@contextlib.contextmanager
def spread_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Says, for as long as it lasts, over which axes the parameters at hand are spread."""
    before = _PARAMETER_AXES.set(axes)
    try:
        yield
    finally:
        _PARAMETER_AXES.reset(before)


def parameter_axes() -> tuple[str, ...]:
    """The axes over which the parameters at hand are spread, where that is known."""
    return _PARAMETER_AXES.get() or ()


def is_unknown() -> bool:
    """Whether nobody has said how arrays are spread: inside a user's own `jit` without a mesh."""
    return _PARAMETER_AXES.get() is None and jax.sharding.get_abstract_mesh().empty


def cutters(lengths: Sequence[int], examples: bool = False) -> tuple[str, ...]:
    """The axes of the known mesh that make the most pieces of equal length of all lengths."""
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
    """Axes to cut along, any of some, and how many pieces that makes: the most first."""
    choices = [
        (names, math.prod(mesh.shape[name] for name in names))
        for number in range(1, len(axes) + 1)
        for names in itertools.combinations(axes, number)
    ]
    return sorted((c for c in choices if c[1] > 1), key=lambda choice: -choice[1])


def axes_of(shardings: list[NamedSharding], mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that any of some shardings uses, in the mesh's order."""
    used = set()
    for sharding in shardings:
        for entry in sharding.spec:
            used |= set(entry) if isinstance(entry, tuple) else {entry}
    return tuple(name for name in mesh.axis_names if name in used)


def explicit(mesh: Any) -> bool:
    """Whether a mesh has Explicit axes."""
    return bool(getattr(mesh, "explicit_axes", ()))
