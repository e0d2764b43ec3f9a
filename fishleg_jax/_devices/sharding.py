"""Sharded arrays: results computed from them stay sharded like them.

Under Auto axes of a mesh the compiler shards intermediate results.  Under Explicit axes JAX needs a
sharding at every reshape and every product; there, too, the algebra of this library is left to the
compiler (`automatic`), and only its results get shardings.  A model is called under the axes chosen
by its user, except for per-example gradients: a single example cannot be sharded.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fishleg_jax import _jaxpr
from fishleg_jax._devices import mesh as _mesh
from fishleg_jax._jit import is_traced

UNKNOWN = (
    "per-example gradients of a convolution under a jit whose arrays do not name the mesh: if "
    "in_shardings or out_shardings shard them, XLA computes wrong numbers; use jax.set_mesh, or "
    "place the arrays with jax.device_put"
)


def automatic(function: Callable, like: Any, *arguments: Any) -> Any:
    """Calls `function(*arguments)` with Explicit axes left to the compiler.

    Args:
        function: Function of arrays and pytrees of arrays.
        like: Pytree of arrays like the result, whose shardings it gets; or of shardings.
        *arguments: Arguments of the function.
    """
    mesh = _mesh.explicit_mesh((like, arguments))
    if mesh is None:
        return function(*arguments)
    where = jax.tree.map(lambda x: _in_mesh(x, mesh), like)
    run = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=where)
    with _mesh.parameters_over(_mesh.axes_of(jax.tree.leaves(where), mesh)):
        return run(*arguments)


def regroup(function: Callable, x: jax.Array, shape: tuple[int, ...], examples: int) -> jax.Array:
    """Applies a function that selects or groups the examples of a batch.

    Args:
        function: Function of the array.
        x: Leaf of a batch, with examples along its first axis.
        shape: Shape of the result.
        examples: Axis of examples in the result, sharded as before if the devices divide it.
    """
    mesh = _mesh.explicit_mesh(x)
    if mesh is None:
        return function(x)
    first, *rest = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[: x.ndim]
    first = _if_divided(first, mesh, shape[examples])
    spec = PartitionSpec(*[None] * examples, first, *rest)
    return automatic(function, NamedSharding(mesh, spec), x)


def joined(stacked: jax.Array, *tail: jax.Array) -> jax.Array:
    """Concatenates stacked chunks `(chunks, examples, ...)` and a remainder along examples."""

    def join(stacked, *tail):
        return jnp.concatenate([stacked.reshape(-1, *stacked.shape[2:]), *tail])

    mesh = _mesh.explicit_mesh(stacked)
    if mesh is None:
        return join(stacked, *tail)
    _, first, *rest = (*jax.typeof(stacked).sharding.spec, *[None] * stacked.ndim)[: stacked.ndim]
    examples = stacked.shape[0] * stacked.shape[1] + sum(len(x) for x in tail)
    spec = PartitionSpec(_if_divided(first, mesh, examples), *rest)
    return automatic(join, NamedSharding(mesh, spec), stacked, *tail)


def _if_divided(entry: Any, mesh: Any, length: int) -> Any:
    """Entry of a spec, or None if its devices do not divide a length."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return None if length % math.prod(mesh.shape[name] for name in names) else entry


def zeros(shapes: Any) -> Any:
    """Zeros of the given shapes and dtypes, with their shardings under Explicit axes."""

    def one(x):
        sharding = getattr(x, "sharding", None)
        explicit = isinstance(sharding, NamedSharding) and _mesh.explicit(sharding.mesh)
        empty = jnp.zeros(x.shape, x.dtype)
        return jax.sharding.reshard(empty, sharding) if explicit else empty

    return jax.tree.map(one, shapes)


def along(x: jax.Array, axis: int, *, examples: bool = False) -> jax.Array:
    """Shards an array along one axis over the known devices, so that other axes are whole.

    Known devices are those over which the parameters are sharded, for Explicit axes or inside `fit`
    and `prune_one_shot`.

    Args:
        x: Array to shard.
        axis: Axis to cut.
        examples: Whether that is an axis of examples, which is cut over all devices of the mesh.
    """
    names = _mesh.cutters((x.shape[axis],), examples)
    if not names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, names))


def halfway(x: jax.Array, axis: int, examples: int) -> jax.Array:
    """Shards one axis over the devices of the parameters, and examples over the others.

    An intermediate step from `along(x, examples, examples=True)` to `along(x, axis)`, without which
    the compiler gathers everything.
    """
    names = _mesh.cutters((x.shape[axis],))
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
    """Shards per-example gradients, one per row, like a mask of the parameter, as far as known.

    This avoids gathering the mask when it is applied; later steps reshard the gradients.
    """
    inner = range(1, x.ndim)
    most = lambda axis: (len(_mesh.cutters((x.shape[axis],))), x.shape[axis])
    return halfway(x, max(inner, key=most), 0) if inner else x


def local(
    function: Callable,
    arguments: tuple,
    cut: tuple[int | None, ...],
    out: int | None,
    *,
    examples: bool = False,
) -> Any:
    """Calls `function(*arguments)` on every device's shard, without gathering anything.

    If the devices are unknown, or do not divide the axes to cut, the call is left to the compiler,
    which may gather.

    Args:
        function: Function of arrays that returns an array or a tuple of arrays.
        arguments: Arrays.
        cut: Sharded axis of each argument; None for a replicated one.
        out: Sharded axis of the result; None to sum over devices.
        examples: Whether these are axes of examples, cut over all devices of the mesh.
    """
    cuts = zip(arguments, cut, strict=True)
    names = _mesh.cutters([x.shape[axis] for x, axis in cuts if axis is not None], examples)
    if not names:
        return function(*arguments)

    def spec(axis):
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, names)

    def piece(*parts):
        found = function(*parts)
        return found if out is not None else jax.lax.psum(found, names)

    return jax.shard_map(
        piece, in_specs=tuple(map(spec, cut)), out_specs=spec(out), check_vma=False
    )(*arguments)


def anchored(tree: Any) -> Any:
    """Adds sharding constraints, so that a user's `jit` that closes over arrays sees their mesh.

    JAX compiles a function whose arguments are on one device for one device, whatever it closes
    over; a `shard_map` inside then fails in XLA.  Sharding constraints name the devices.  Nothing
    changes for Explicit axes, where JAX itself requires `jax.set_mesh`.
    """

    def one(x):
        sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
            return x
        if _mesh.explicit(sharding.mesh) or not sharding.is_fully_addressable:
            return x
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(one, tree)


def of_examples(function: Callable, shared: Any, examples: Any) -> Any:
    """Calls `function(shared, examples)`, one row per example, on each device's shard of examples.

    Examples are sharded over axes that no parameter is sharded over, if there are any; the compiler
    handles the other axes.  With a convolution it must not shard anything: XLA computes wrong
    per-example gradients of kernels if all remaining devices share them (seen with jax 0.10 on the
    CPU, and with jax alone; in jax issue 32157 there is an error instead).  Then the shared arrays
    are replicated.

    Args:
        function: Function of shared arrays, and of arrays with a leading axis of examples.
        shared: Pytree of arrays that all devices need.
        examples: Pytree of arrays with a leading axis of examples.
    """
    mesh = _mesh.automatic_mesh((shared, examples))
    if mesh is None:
        in_the_dark = _mesh.is_unknown() and is_traced(examples) and jax.device_count() > 1
        if in_the_dark and _convolves(function, shared, examples):
            warnings.warn(UNKNOWN, stacklevel=2)
        return function(shared, examples)
    # choose axes that divide the examples: those without parameters first
    number = jax.tree.leaves(examples)[0].shape[0]
    alone = _convolves(function, shared, examples)
    free = [name for name in mesh.axis_names if name not in _mesh.parameter_axes()]
    choices = [*([] if alone else _mesh.choices(free, mesh)), *_mesh.choices(mesh.axis_names, mesh)]
    names = next((names for names, parts in choices if number % parts == 0), None)
    if names is None and not alone:
        return function(shared, examples)
    cut = PartitionSpec(names)  # None replicates the examples
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), cut),
        out_specs=cut,
        axis_names=set(mesh.axis_names if alone else names),
        check_vma=False,
    )(shared, examples)


def _convolves(function: Callable, *arguments: Any) -> bool:
    return _jaxpr.has(jax.make_jaxpr(function)(*arguments), "conv_general_dilated")


def _in_mesh(x: Any, mesh: Any) -> NamedSharding:
    if isinstance(x, NamedSharding):
        return x
    sharding = getattr(jax.typeof(x), "sharding", None)
    explicit = sharding is not None and _mesh.explicit(sharding.mesh)
    return NamedSharding(mesh, sharding.spec if explicit else PartitionSpec())
