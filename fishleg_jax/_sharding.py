"""Arrays that are spread over devices: what is made of them stays spread like them.

Under Auto axes of a mesh the compiler spreads what is computed.  Under Explicit axes JAX wants to
be told at every reshape and every product; the algebra of this library is left to the compiler
there too (`automatic`), and only its results are told.  A model is called under the axes that its
user has chosen, but for per-example gradients: one example can't be spread over devices.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fishleg_jax import _tree


def sharding_of(x: Any) -> NamedSharding | None:
    """How an array is spread, where that is known: of Auto axes it is not under `jit`."""
    if isinstance(x, jax.core.Tracer):
        sharding = jax.typeof(x).sharding
        return sharding if _explicit(sharding.mesh) else None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def automatic(function: Callable, like: Any, *arguments: Any) -> Any:
    """`function(*arguments)` with Explicit axes left to the compiler.

    Args:
        function: of arrays, and trees of them.
        like: a tree of arrays like the result, which is spread like them; or of shardings.
        *arguments: what it is given.
    """
    mesh = _explicit_mesh((like, arguments))
    if mesh is None:
        return function(*arguments)
    where = jax.tree.map(lambda x: _in_mesh(x, mesh), like)
    run = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=where)
    with _spread_over(_axes(jax.tree.leaves(where), mesh)):
        return run(*arguments)


class Placement(NamedTuple):
    """How the leaves of a tree are spread; hashable.  One stays as it is where that is None."""

    leaves: tuple[NamedSharding | None, ...]

    def of(self, tree: Any) -> Any:
        """A tree that is spread like this."""
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(map(_put, leaves, self.leaves))

    def of_shapes(self, tree: Any) -> Any:
        """Shapes and dtypes of a tree, as those of arrays that are spread like this."""
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(leaves, self.leaves, strict=True)
        return structure.unflatten(
            x if s is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in pairs
        )


def _put(x: Any, sharding: NamedSharding | None) -> Any:
    if sharding is None or sharding_of(x) == sharding:
        return x
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if _explicit(sharding.mesh):
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def placed(function: Callable, placement: Placement, *arguments: Any) -> Any:
    """What a function gives, placed."""
    return placement.of(function(*arguments))


def like(tree: Any, params: Any) -> Any:
    """A tree with the structure of the parameters, spread like them where that is known."""
    return placement_like(params).of(tree)


def placement_like(params: Any) -> Placement:
    """How parameters are spread, where that is known."""
    return Placement(tuple(map(sharding_of, jax.tree.leaves(params))))


def placement_for(state: Any, params: Any) -> Placement:
    """How the state of an estimate is spread so that each part lies like what it belongs to.

    A part belongs to the parameter that has its path, or whose name is a key of it, else to all.
    One of the parameter's shape is spread like it; another over the same devices, along its first
    axis (of blocks) or else the longest that can be cut.

    Args:
        state: arrays, or their shapes.
        params: the parameters.

    Returns:
        The placement of the state, which changes nothing where nothing is known of the parameters.
    """
    owners = [(path, _tree.leaf_name(path), x, sharding_of(x))
              for path, x in jax.tree_util.tree_leaves_with_path(params)]  # fmt: skip
    known = [s for *_, s in owners if s is not None]
    if not known:
        return Placement((None,) * len(jax.tree.leaves(state)))
    mesh = known[0].mesh

    def one(path, x):
        keys = {getattr(entry, "key", None) for entry in path}
        own = [
            (leaf, sharding)
            for leaf_path, name, leaf, sharding in owners
            if sharding is not None and (name in keys or (leaf_path and _ends(path, leaf_path)))
        ]
        for leaf, sharding in own:
            if leaf.shape == x.shape:
                return sharding
        theirs = [sharding for _, sharding in own] or (known if len(x.shape) > 1 else [])
        return NamedSharding(mesh, _cut(x.shape, mesh, _axes(theirs, mesh)))

    return Placement(tuple(one(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(state)))


def regroup(function: Callable, x: jax.Array, shape: tuple[int, ...], examples: int) -> jax.Array:
    """A function of the examples of a batch that picks some or puts them into groups.

    Args:
        function: of the array.
        x: a leaf of a batch, with examples along its first axis.
        shape: of the result.
        examples: the axis of the result along which they then lie, and are spread as before where
            the devices divide them.
    """
    mesh = _explicit_mesh(x)
    if mesh is None:
        return function(x)
    first, *rest = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[: x.ndim]
    first = _if_divided(first, mesh, shape[examples])
    spec = PartitionSpec(*[None] * examples, first, *rest)
    return automatic(function, NamedSharding(mesh, spec), x)


def joined(stacked: jax.Array, *tail: jax.Array) -> jax.Array:
    """Stacked chunks `(chunks, examples, ...)` and what is left of them, in a row of examples."""

    def join(stacked, *tail):
        return jnp.concatenate([stacked.reshape(-1, *stacked.shape[2:]), *tail])

    mesh = _explicit_mesh(stacked)
    if mesh is None:
        return join(stacked, *tail)
    _, first, *rest = (*jax.typeof(stacked).sharding.spec, *[None] * stacked.ndim)[: stacked.ndim]
    examples = stacked.shape[0] * stacked.shape[1] + sum(len(x) for x in tail)
    spec = PartitionSpec(_if_divided(first, mesh, examples), *rest)
    return automatic(join, NamedSharding(mesh, spec), stacked, *tail)


def _if_divided(entry: Any, mesh: Any, length: int) -> Any:
    """An entry of a spec, or None where its devices do not divide a length."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return None if length % math.prod(mesh.shape[name] for name in names) else entry


def zeros(shapes: Any) -> Any:
    """Zeros of some shapes and dtypes, spread as these say where axes are Explicit."""

    def one(x):
        sharding = getattr(x, "sharding", None)
        spread = isinstance(sharding, NamedSharding) and _explicit(sharding.mesh)
        empty = jnp.zeros(x.shape, x.dtype)
        return jax.sharding.reshard(empty, sharding) if spread else empty

    return jax.tree.map(one, shapes)


def along(x: jax.Array, axis: int, *, examples: bool = False) -> jax.Array:
    """An array cut along one axis over the devices that are known, so that the others are whole.

    They are those over which the parameters are spread, where that is known: of Explicit axes, or
    in `fit` and `prune_one_shot`.

    Args:
        x: the array.
        axis: along which it is cut.
        examples: whether that is one of examples; then all devices of the mesh have a part.
    """
    names = cutters((x.shape[axis],), examples)
    if not names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, names))


def halfway(x: jax.Array, axis: int, examples: int) -> jax.Array:
    """Cut along one axis over the devices of the parameters, and along examples over the others.

    On the way from `along(x, examples, examples=True)` to `along(x, axis)`, which the compiler else
    makes by gathering everything.
    """
    names = cutters((x.shape[axis],))
    if not names:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    others = tuple(name for name in mesh.axis_names if name not in names)
    spec = [None] * x.ndim
    spec[axis] = names
    if others and x.shape[examples] % math.prod(mesh.shape[name] for name in others) == 0:
        spec[examples] = others
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def cut_gradients(x: jax.Array) -> jax.Array:
    """Gradients of examples, one a row, cut as far as is known as a mask of the parameter is.

    So a mask is not gathered where they meet; they go on to where they are needed.
    """
    inner = range(1, x.ndim)
    most = lambda axis: (len(cutters((x.shape[axis],))), x.shape[axis])
    return halfway(x, max(inner, key=most), 0) if inner else x


def local(
    function: Callable,
    arguments: tuple,
    cut: tuple[int | None, ...],
    out: int | None,
    *,
    examples: bool = False,
) -> Any:
    """`function(*arguments)`, each device with its piece and without a word to the others.

    Without devices that are known, or where they don't divide what is cut, it is left as it is to
    the compiler, which may gather.

    Args:
        function: of arrays, to an array or a tuple of them.
        arguments: arrays.
        cut: for each of them the axis along which it is cut; None for one that all have whole.
        out: the axis along which the pieces of the result lie; None for a sum of them.
        examples: see `along`.
    """
    cuts = zip(arguments, cut, strict=True)
    names = cutters([x.shape[axis] for x, axis in cuts if axis is not None], examples)
    if not names:
        return function(*arguments)

    def spec(axis):
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, names)

    def piece(*parts):
        found = function(*parts)
        return found if out is not None else jax.lax.psum(found, names)

    return jax.shard_map(
        piece, in_specs=tuple(map(spec, cut)), out_specs=spec(out), check_vma=False
    )(*arguments)  # fmt: skip


def in_mesh_of_params(function: Callable) -> Callable:
    """Sets the mesh of the parameters, its second argument, for a function on the host."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        params = kwargs["params"] if "params" in kwargs else args[1] if len(args) > 1 else ()
        known = [s for s in map(sharding_of, jax.tree.leaves(params)) if s is not None]
        mesh = known[0].mesh if known else None
        free = jax.sharding.get_abstract_mesh().empty and isinstance(mesh, jax.sharding.Mesh)
        with contextlib.ExitStack() as known_here:
            if free:
                known_here.enter_context(jax.set_mesh(mesh))
            if mesh is not None:
                known_here.enter_context(_spread_over(_axes(known, mesh)))
            return function(*args, **kwargs)

    return run


# Axes over which the parameters at hand are spread.  Under Auto axes what was traced for some may
# be found again for others: then the compiler has more to move, and the numbers are the same.
_PARAMETER_AXES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "axes", default=()
)


@contextlib.contextmanager
def _spread_over(axes: tuple[str, ...]) -> Iterator[None]:
    before = _PARAMETER_AXES.set(axes)
    try:
        yield
    finally:
        _PARAMETER_AXES.reset(before)


def cutters(lengths: Sequence[int], examples: bool = False) -> tuple[str, ...]:
    """The axes of the known mesh that make the most pieces of equal length of all lengths."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_types) != {AxisType.Auto}:
        return ()
    usable = mesh.axis_names
    if not examples:
        usable = [name for name in usable if name in _PARAMETER_AXES.get()]
    return next(
        (
            names
            for names, parts in _choices(usable, mesh)
            if all(length % parts == 0 for length in lengths)
        ),
        (),
    )


def _choices(axes: Sequence[str], mesh: Any) -> list[tuple[tuple[str, ...], int]]:
    """Axes to cut along, any of some, and how many pieces that makes: the most first."""
    choices = [
        (names, math.prod(mesh.shape[name] for name in names))
        for number in range(1, len(axes) + 1)
        for names in itertools.combinations(axes, number)
    ]
    return sorted((c for c in choices if c[1] > 1), key=lambda choice: -choice[1])


def _ends(path: tuple, end: tuple) -> bool:
    return len(path) > len(end) and path[-len(end) :] == end


def _axes(shardings: list[NamedSharding], mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that any of some shardings uses, in the mesh's order."""
    used = set()
    for sharding in shardings:
        for entry in sharding.spec:
            used |= set(entry) if isinstance(entry, tuple) else {entry}
    return tuple(name for name in mesh.axis_names if name in used)


def _cut(shape: tuple[int, ...], mesh: Any, axes: tuple[str, ...]) -> PartitionSpec:
    for names, parts in _choices(axes, mesh):
        fitting = [k for k, n in enumerate(shape) if n and n % parts == 0]
        if fitting:
            best = 0 if fitting[0] == 0 else max(fitting, key=lambda k: shape[k])
            return PartitionSpec(*[None] * best, names)
    return PartitionSpec()


def _explicit(mesh: Any) -> bool:
    return bool(getattr(mesh, "explicit_axes", ()))


def _explicit_mesh(tree: Any) -> Any:
    """The mesh with Explicit axes over which any array of a tree is spread; None without one."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            mesh = jax.typeof(x).sharding.mesh
            if _explicit(mesh):
                return mesh
    return None


def _in_mesh(x: Any, mesh: Any) -> NamedSharding:
    if isinstance(x, NamedSharding):
        return x
    sharding = getattr(jax.typeof(x), "sharding", None)
    spec = sharding.spec if sharding is not None and _explicit(sharding.mesh) else PartitionSpec()
    return NamedSharding(mesh, spec)
