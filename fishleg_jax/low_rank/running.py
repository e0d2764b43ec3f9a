"""Runs a network whose kernels are factors: layer by layer, as several smaller layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _tree
from fishleg_jax._jaxpr import CUSTOM, core, opened
from fishleg_jax._jaxpr import apply as apply_equation
from fishleg_jax.low_rank.factors import channels_of, factors_of, is_chain, is_split, multiplied_out
from fishleg_jax.low_rank.uses import Kernel, called, passed_on

ARRAYS = (jax.Array, np.ndarray, np.generic)


class Factorised(NamedTuple):
    """Leaf with factors: its key path, the factors in the order of its axes, and its shape."""

    name: str
    factors: tuple[Any, ...]
    shape: tuple[int, ...]


def apply(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """Makes a function of factorised parameters from a function of the parameters.

    The function is traced, and every product with a kernel is replaced by products with its
    factors: `x @ kernel` by `(x @ left) @ right`, a convolution by two or three convolutions.  A
    transposed kernel takes them in reverse.  The result is differentiable and runs under `jit` and
    `vmap` as the function itself does.  A kernel that enters a function with `jax.custom_vjp` or
    `jax.custom_jvp` is multiplied out in front of it, which keeps the rule but saves nothing.

    Args:
        function: Function `(params, *arguments)`, such as a model's `predict` or a training loss.
            Arguments that are not arrays, such as flags, are passed on as they are.
        like: Pytree of the shapes and dtypes of the parameters before their decomposition:
            the parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
        A function `(params, *arguments)`, where the place of a kernel may be taken by
        `{"left", "right"}` or `{"first", "core", "last"}`, in the order of the kernel's axes
        whatever the layout: a kernel of shape (m, n) is `left @ right` of shapes (m, r) and (r, n).
        A kernel of more axes whose first or last axes are contracted together is
        `tensordot(left, right, 1)`.  Factors of a convolution's kernel have its axes, with the rank
        in the place of one channel axis, and size 1 along spatial axes of another factor.

    Raises:
        ValueError: When called, with parameters of another structure, with factors that do not
            multiply to the leaf's shape, or with factors of a leaf that the function does more with
            than multiply its inputs along all axes of one factor: arithmetic, a reshape, a slice, a
            loop, a product with batched axes, a grouped convolution, or an output.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> like = {"kernel": jnp.zeros((4, 3))}
        >>> f = flj.low_rank.apply(lambda p, x: x @ p["kernel"], like)
        >>> factors = {"left": jnp.ones((4, 1)), "right": jnp.ones((1, 3))}
        >>> f({"kernel": factors}, jnp.ones((1, 4)))
        Array([[4., 4., 4.]], dtype=float32)
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    structure = jax.tree.structure(shapes)
    names = [name for name, _ in _tree.named_leaves(shapes)]

    def run(params, *arguments):
        try:
            subtrees = structure.flatten_up_to(params)
        except ValueError as error:
            raise ValueError(
                "params must have the structure of the parameters before their decomposition, "
                f"with factors in the place of kernels: {error}"
            ) from error
        values: list[Any] = []
        traced = []
        for subtree, shape, name in zip(subtrees, jax.tree.leaves(shapes), names, strict=True):
            factors = factors_of(subtree)
            if factors is None:
                values.append(subtree)
                traced.append(subtree)
            else:
                kernel = _kernel(name, factors, shape.shape)
                values.append(kernel)
                traced.append(jax.ShapeDtypeStruct(shape.shape, factors[0].dtype))
        if not any(isinstance(x, Kernel) for x in values):
            return function(params, *arguments)

        # Arrays are traced; flags, numbers and texts stay as they are.
        leaves, tree = jax.tree.flatten(arguments)
        arrays = [x for x in leaves if isinstance(x, ARRAYS)]

        def of_arrays(params, arrays):
            given = iter(arrays)
            whole = [next(given) if isinstance(x, ARRAYS) else x for x in leaves]
            return function(params, *tree.unflatten(whole))

        closed, out = jax.make_jaxpr(of_arrays, return_shape=True)(
            structure.unflatten(traced), arrays
        )
        results = _evaluate(closed.jaxpr, closed.consts, [*values, *arrays])
        for x in results:
            if isinstance(x, Kernel):
                raise _refused(x, "is an output")
        return jax.tree.unflatten(jax.tree.structure(out), results)

    run.__wrapped__ = function  # shows how many arguments it takes
    return run


def _kernel(name: str, factors: Sequence[Any], shape: tuple[int, ...]) -> Kernel:
    """Mark of a leaf with factors, or a ValueError if they do not make it."""
    if not is_split(factors, shape) and channels_of(factors, shape) is None:
        given = ", ".join(str(tuple(x.shape)) for x in factors)
        raise ValueError(
            f"params: {name!r} needs factors that multiply to the shape {shape} in the order of "
            f"its axes, got factors of shapes {given}"
        )
    return Kernel(Factorised(name, tuple(factors), shape), tuple(range(len(shape))))


def _refused(kernel: Kernel, use: str) -> ValueError:
    name = kernel.leaf.name
    return ValueError(
        f"params: {name!r} has factors, but the function does not multiply its inputs "
        f"with it along axes of one factor: it {use}; leave this kernel whole"
    )


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a traced function, some of whose values are factorised kernels."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core().Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [read(x) for x in equation.invars]
        kernels = [x if isinstance(x, Kernel) else None for x in operands]
        inner = called(equation)
        if not any(kernels):
            results = _plain(jaxpr, equation, operands)
        elif equation.primitive.name in CUSTOM:  # inlined it would lose its rule
            results = _plain(jaxpr, equation, list(map(_whole, operands)))
        elif inner is not None:
            results = _evaluate(opened(inner), getattr(inner, "consts", ()), operands)
        elif (moved := passed_on(equation, kernels)) is not None:
            results = [_cast(equation, moved)]
        else:
            results = [_multiplied(equation, operands, kernels)]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _plain(jaxpr: Any, equation: Any, operands: Sequence[Any]) -> list[Any]:
    pairs = zip(equation.invars, operands, strict=True)
    given = {x: value for x, value in pairs if not isinstance(x, core().Literal)}
    return apply_equation(equation, jaxpr, given.__getitem__)


def _whole(value: Any) -> Any:
    """A kernel multiplied out; any other value as it is."""
    if not isinstance(value, Kernel):
        return value
    return multiplied_out(value.leaf.factors, value.leaf.shape).transpose(value.axes)


def _cast(equation: Any, kernel: Kernel) -> Kernel:
    """Does to the factors what an equation that passes the kernel on does to the kernel."""
    if equation.primitive.name == "stop_gradient":
        change = jax.lax.stop_gradient
    elif equation.primitive.name == "convert_element_type":
        change = lambda x: x.astype(equation.params["new_dtype"])  # noqa: E731
    else:
        return kernel
    changed = tuple(map(change, kernel.leaf.factors))
    return kernel._replace(leaf=kernel.leaf._replace(factors=changed))


def _multiplied(equation: Any, operands: Sequence[Any], kernels: Sequence[Kernel | None]) -> Any:
    """Applies the factors of a kernel, one layer after the other."""
    position = next(k for k, x in enumerate(kernels) if x is not None)
    kernel = kernels[position]
    operation = equation.primitive.name
    result = None
    if operation == "dot_general" and kernels[1 - position] is None:
        result = _dense(equation, operands[1 - position], kernel, position)
    if operation == "conv_general_dilated" and position == 1:
        result = _convolution(equation, operands[0], kernel)
    if result is None:
        raise _refused(kernel, f"is an operand of {operation}")
    return result


def _dense(equation: Any, x: Any, kernel: Kernel, position: int) -> Any | None:
    """Products with both factors; None unless one has all axes that are contracted and no other."""
    params = equation.params
    contracted, batched = params["dimension_numbers"]
    _, factors, shape = kernel.leaf
    if any(batched) or not is_split(factors, shape):
        return None
    left, right = factors
    inside = [kernel.axes[k] for k in contracted[position]]
    outside = [axis for axis in kernel.axes if axis not in inside]
    rows = left.ndim - 1  # axes of the leaf that the left factor has
    if sorted(inside) == [*range(rows)]:
        last = right.transpose(0, *(axis - rows + 1 for axis in outside))
        first, own = left, inside
    elif sorted(outside) == [*range(rows)]:
        last = left.transpose(rows, *outside)
        first, own = right, [axis - rows + 1 for axis in inside]
    else:
        return None
    options = {key: params[key] for key in ("precision", "preferred_element_type")}
    if position == 1:
        dims = ((contracted[0], own), ((), ()))
        x = jax.lax.dot_general(x, first, dims, **options)
        return jax.lax.dot_general(x, last, (((x.ndim - 1,), (0,)), ((), ())), **options)
    x = jax.lax.dot_general(first, x, ((own, contracted[1]), ((), ())), **options)
    return jax.lax.dot_general(last, x, (((0,), (0,)), ((), ())), **options)


def owners(kernels: Sequence[tuple[int, ...]], spatial: Sequence[int]) -> list[int]:
    """For each spatial axis of kernels the number of the factor that moves along it."""
    return [next((j for j, shape in enumerate(kernels) if shape[axis] > 1), 0) for axis in spatial]


def _convolution(equation: Any, x: Any, kernel: Kernel) -> Any | None:
    """Convolutions with all factors; None unless they are multiplied along its channels."""
    params = equation.params
    lhs, rhs, out = params["dimension_numbers"]
    place = tuple(kernel.axes[k] for k in rhs)  # axes of the leaf: out, in, spatial axes
    _, factors, shape = kernel.leaf
    turned = place[1] > place[0]
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    if grouped or not is_chain(factors, shape, tuple(sorted(place[:2]))):
        return None
    layers = factors[::-1] if turned else factors
    owner = owners([factor.shape for factor in layers], place[2:])
    # what a factor without extent along an axis does there: nothing
    idle = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
    for j, factor in enumerate(layers):
        own = {
            key: tuple(params[key][k] if owner[k] == j else rest for k in range(len(owner)))
            for key, rest in idle.items()
        }
        last = j == len(layers) - 1
        x = jax.lax.conv_general_dilated(
            x,
            factor,
            **own,
            dimension_numbers=jax.lax.ConvDimensionNumbers(lhs, place, out if last else lhs),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
    return x
