"""Arrays that are spread over devices: what is made of them stays spread like them.

Under Auto axes of a mesh the compiler spreads what is computed.  Under Explicit axes JAX wants to
be told at every reshape and every product; the algebra of this library is left to the compiler
there too (`automatic`), and only its results are told.  A model is called under the axes that its
user has chosen, but for per-example gradients: one example can't be spread over devices.
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
    "gradients of a convolution, example by example, under a jit of which no array tells the mesh: "
    "where in_shardings or out_shardings spread them over devices, XLA makes wrong numbers; use "
    "jax.set_mesh, or place the arrays by jax.device_put"
)


def automatic(function: Callable, like: Any, *arguments: Any) -> Any:
    """`function(*arguments)` with Explicit axes left to the compiler.

    Args:
        function: of arrays, and trees of them.
        like: a tree of arrays like the result, which is spread like them; or of shardings.
        *arguments: what it is given.
    """
    mesh = _mesh.explicit_mesh((like, arguments))
    if mesh is None:
        return function(*arguments)
    where = jax.tree.map(lambda x: _in_mesh(x, mesh), like)
    run = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=where)
    with _mesh.spread_over(_mesh.axes_of(jax.tree.leaves(where), mesh)):
        return run(*arguments)


def regroup(function: Callable, x: jax.Array, shape: tuple[int, ...], examples: int) -> jax.Array:
    """A function of the examples of a batch that picks some or puts them into groups.

    Args:
        function: of the array.
        x: a leaf of a batch, with examples along its first axis.
        shape: of the result.
        examples: the axis of the result along which they then lie, and are spread as before where
            the devices divide them.
    """
    mesh = _mesh.explicit_mesh(x)
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

    mesh = _mesh.explicit_mesh(stacked)
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
        spread = isinstance(sharding, NamedSharding) and _mesh.explicit(sharding.mesh)
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
    names = _mesh.cutters((x.shape[axis],), examples)
    if not names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, names))


def halfway(x: jax.Array, axis: int, examples: int) -> jax.Array:
    """Cut along one axis over the devices of the parameters, and along examples over the others.

    On the way from `along(x, examples, examples=True)` to `along(x, axis)`, which the compiler else
    makes by gathering everything.
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
    """Gradients of examples, one a row, cut as far as is known as a mask of the parameter is.

    So a mask is not gathered where they meet; they go on to where they are needed.
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
    """The same arrays, whose mesh a user's `jit` that closes over them gets to know.

    JAX compiles a function whose arguments lie on one device for one device, whatever it closes
    over; a `shard_map` inside then ends in an error of XLA.  Sharding constraints name devices.
    Nothing changes for Explicit axes, where JAX itself asks for `jax.set_mesh`.
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
    """`function(shared, examples)`, a row for every example, each device with its own examples.

    Examples are cut along axes that no parameter is spread over, where there are any; along the
    others the compiler goes on.  But with a convolution it must have nothing to spread: of kernels'
    gradients, example by example, XLA makes wrong numbers where all devices that are left share
    them (seen with jax 0.10 on the CPU, and with jax alone; in jax issue 32157 there is an error
    instead).  Then each device has all of the shared arrays.

    Args:
        function: of arrays that all devices need, and of arrays with a leading axis of examples.
        shared: a tree of arrays.
        examples: a tree of arrays.
    """
    mesh = _mesh.automatic_mesh((shared, examples))
    if mesh is None:
        in_the_dark = _mesh.is_unknown() and is_traced(examples) and jax.device_count() > 1
        if in_the_dark and _convolves(function, shared, examples):
            warnings.warn(UNKNOWN, stacklevel=2)
        return function(shared, examples)
    number = jax.tree.leaves(examples)[0].shape[0]
    alone = _convolves(function, shared, examples)
    free = [name for name in mesh.axis_names if name not in _mesh.parameter_axes()]
    choices = [*([] if alone else _mesh.choices(free, mesh)), *_mesh.choices(mesh.axis_names, mesh)]
    names = next((names for names, parts in choices if number % parts == 0), None)
    if names is None and not alone:
        return function(shared, examples)
    cut = PartitionSpec(names)  # by None not at all: then every device has all of them
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
    told = sharding is not None and _mesh.explicit(sharding.mesh)
    return NamedSharding(mesh, sharding.spec if told else PartitionSpec())
