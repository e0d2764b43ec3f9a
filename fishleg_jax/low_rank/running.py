"""Runs a network whose kernels are factors: layer by layer, as several smaller layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fishleg_jax import _tree
from fishleg_jax._jaxpr import core, opened
from fishleg_jax.low_rank.uses import Kernel, called, passed_on

KEYS = (("left", "right"), ("first", "core", "last"))  # of factors, in the order of their layers


def factors_of(subtree: Any) -> list[Any] | None:
    """The factors in the place of a leaf, in the order of their layers; None for a whole leaf."""
    if isinstance(subtree, Mapping):
        for keys in KEYS:
            if set(subtree) == set(keys):
                return [subtree[key] for key in keys]
    return None


def apply(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """Makes a function of factorised parameters from a function of the parameters.

    The function is traced, and every product with a kernel is replaced by products with its
    factors: `x @ kernel` by `(x @ left) @ right`, a convolution by two or three convolutions.  It
    is differentiable and runs under `jit` and `vmap` as the function itself does.

    Args:
        function: Function `(params, *arguments)` of pytrees of arrays, such as a model's `predict`
            or a training loss.
        like: Pytree of the shapes and dtypes of the parameters before their decomposition:
            the parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
        A function `(params, *arguments)`, where the place of a kernel may be taken by
        `{"left", "right"}` or `{"first", "core", "last"}`: kernels of layers in their order, of
        shape (in, out) or (*spatial, in, out).

    Raises:
        ValueError: When called, with parameters of another structure, or factors of a leaf that the
            function does more with than multiply its inputs.

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
                values.append(Kernel((name, factors), tuple(range(len(shape.shape)))))
                traced.append(jax.ShapeDtypeStruct(shape.shape, factors[0].dtype))
        if not any(isinstance(x, Kernel) for x in values):
            return function(params, *arguments)
        closed, out = jax.make_jaxpr(function, return_shape=True)(
            structure.unflatten(traced), *arguments
        )
        values += jax.tree.leaves(arguments)
        results = _evaluate(closed.jaxpr, closed.consts, values)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    run.__wrapped__ = function  # shows how many arguments it takes
    return run


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
            results = _plain(jaxpr, equation, read)
        elif inner is not None:
            results = _evaluate(opened(inner), getattr(inner, "consts", ()), operands)
        elif (moved := passed_on(equation, kernels)) is not None:
            results = [_cast(equation, moved)]
        else:
            results = [_multiplied(equation, operands, kernels)]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _plain(jaxpr: Any, equation: Any, read: Callable) -> list[Any]:
    # wrap the operation in a function: how to call it directly differs between JAX versions
    inputs = [x for x in equation.invars if not isinstance(x, core().Literal)]
    inputs = list(dict.fromkeys(inputs))
    one = jaxpr.replace(constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation])
    return core().jaxpr_as_fun(core().ClosedJaxpr(one, []))(*map(read, inputs))


def _cast(equation: Any, kernel: Kernel) -> Kernel:
    if equation.primitive.name != "convert_element_type":
        return kernel
    name, factors = kernel.leaf
    dtype = equation.params["new_dtype"]
    return kernel._replace(leaf=(name, [x.astype(dtype) for x in factors]))


def _multiplied(equation: Any, operands: Sequence[Any], kernels: Sequence[Kernel | None]) -> Any:
    """Applies the factors of a kernel, one layer after the other."""
    position = next(k for k, x in enumerate(kernels) if x is not None)
    name, factors = kernels[position].leaf
    operation = equation.primitive.name
    if operation == "dot_general" and kernels[1 - position] is None:
        return _dense(equation, operands[1 - position], factors, position)
    if operation == "conv_general_dilated" and position == 1:
        return _convolution(equation, operands[0], factors)
    raise ValueError(
        f"params: {name!r} has factors, but the function does not multiply its inputs with it: it "
        f"is an operand of {operation}"
    )


def _dense(equation: Any, x: Any, factors: Sequence[Any], position: int) -> Any:
    params = equation.params
    axis = params["dimension_numbers"][0][1 - position][0]
    options = {key: params[key] for key in ("precision", "preferred_element_type")}
    for factor in factors:
        if position == 1:
            x = jax.lax.dot_general(x, factor, (((axis,), (0,)), ((), ())), **options)
            axis = x.ndim - 1
        else:
            x = jax.lax.dot_general(factor, x, (((0,), (axis,)), ((), ())), **options)
            axis = 0
    return x


def owners(kernels: Sequence[tuple[int, ...]], spatial: int) -> list[int]:
    """For each spatial axis the number of the factor that moves along it."""
    return [
        next((j for j, shape in enumerate(kernels) if shape[axis] > 1), 0)
        for axis in range(spatial)
    ]


def _convolution(equation: Any, x: Any, factors: Sequence[Any]) -> Any:
    params = equation.params
    lhs, _, out = params["dimension_numbers"]
    spatial = len(lhs) - 2
    rhs = (spatial + 1, spatial, *range(spatial))  # (spatial axes, in, out)
    owner = owners([factor.shape for factor in factors], spatial)
    # what a factor without extent along an axis does there: nothing
    idle = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
    for j, factor in enumerate(factors):
        own = {
            key: tuple(params[key][k] if owner[k] == j else rest for k in range(spatial))
            for key, rest in idle.items()
        }
        last = j == len(factors) - 1
        x = jax.lax.conv_general_dilated(
            x,
            factor,
            **own,
            dimension_numbers=jax.lax.ConvDimensionNumbers(lhs, rhs, out if last else lhs),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
    return x
