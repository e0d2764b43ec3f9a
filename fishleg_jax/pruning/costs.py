"""Cost of one weight of a leaf: operations per example, counted from the model, or bytes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._jaxpr import core, functions, opened
from fishleg_jax.model import BatchLike, Model, Params, predict, split_batch

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr

UNITS = ("flops", "bytes")

# Origin of a value: None if it depends on the inputs, and so is an activation; else the leaves that
# it was computed from, each with the part of its elements that come from there.
Origin = Counter | None

# operations without arithmetic: weights that are moved next to activations, or looked up, are free
MOVES = (
    "concatenate",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "pad",
    "select_n",
    "sort",
)
# operations with as many results as operands, each equal to its operand
IDENTITIES = ("device_put", "optimization_barrier")

# not elementwise, though their shapes may suggest it
OPAQUE = ("ffi_call", "triangular_solve")


def weight_costs(model: Model, params: Params, batch: BatchLike, *, unit: str = "flops") -> Params:
    """Cost of one weight of each leaf: the saving for each weight that is pruned.

    With `unit="flops"` the model is traced, never run.  Operations count where weights meet
    activations, which are values that depend on the inputs:

    - a product of matrices or a convolution counts two for every multiplication and addition; zeros
      of a convolution's padding count as inputs do, those between dilated inputs do not;
    - an elementwise operation counts one for every element of its result;
    - moving and looking up is free, so an embedding that is only looked up costs 0.

    Values computed from weights and constants alone (reshaped, cast, masked, normalised, multiplied
    with each other) do not depend on the example: they are free, and where they meet activations,
    each leaf behind them is charged in full.  Each of several concatenated leaves is charged for
    its part.  A `scan` counts once per iteration, and for a `cond` every leaf is charged for the
    branch that uses it most.

    Args:
        model: Model.
        params: Parameters, any pytree; shapes and dtypes (`jax.ShapeDtypeStruct`) suffice.
        batch: `(inputs, targets[, constants])`; its number of examples does not matter, but the
            length of sequences and the size of images do.  Ignored for bytes.
        unit: `flops`, the default, for floating-point operations per example, `bytes` for the
            memory that a weight takes in the leaf's dtype.

    Returns:
        A pytree like the parameters, with a Python float for each leaf: the average over its
        weights.  A leaf that the model does not use costs 0 operations.  Scores can be divided by
        positive costs only: the caller ensures that those of prunable leaves are positive.

    Raises:
        ValueError: An unknown unit; a list of batches; inputs without examples; weights that meet
            activations in a `while` loop, whose length is unknown before it runs, or in an
            operation (such as a custom kernel) whose operations cannot be counted.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> from fishleg_jax.pruning.costs import weight_costs
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        >>> model = flj.Model(lambda p, x: x @ p["kernel"] + p["bias"], flj.likelihoods.gaussian())
        >>> weight_costs(model, params, (jnp.ones((8, 3)), None))
        {'bias': 1.0, 'kernel': 2.0}
        >>> weight_costs(model, params, (jnp.ones((8, 7, 3)), None))  # seven positions
        {'bias': 7.0, 'kernel': 14.0}
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {_text.shown(unit)}")
    if isinstance(batch, list):
        raise ValueError("batch must be a tuple (inputs, targets[, constants]), got a list")
    if unit == "bytes":
        return jax.tree.map(lambda x: float(jnp.dtype(jnp.result_type(x)).itemsize), params)
    leaves = _tree.named_leaves(params)
    _tree.check_names(leaves)
    flops, examples = _total_flops(model, params, batch, [name for name, _ in leaves])
    costs = [flops[name] / examples / max(math.prod(jnp.shape(x)), 1) for name, x in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), costs)


def _total_flops(
    model: Model, params: Params, batch: BatchLike, names: list
) -> tuple[Counter, int]:
    """Operations in which each leaf, by name, takes part on a batch, and its number of examples."""
    inputs, _, constants = split_batch(batch)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    if not shapes or not shapes[0] or not shapes[0][0]:
        raise ValueError(f"batch must have inputs with a leading axis of examples, got {shapes}")
    traced = jax.make_jaxpr(lambda p, x, c: predict(model, p, (x, None, *c)))
    origins: list[Origin] = [Counter({name: 1.0}) for name in names]
    origins += [None] * len(shapes)
    origins += [Counter()] * len(jax.tree.leaves(constants))
    return _walk(traced(params, inputs, constants), origins)[1], shapes[0][0]


def _walk(function: "Jaxpr | ClosedJaxpr", operands: list[Origin]) -> tuple[list[Origin], Counter]:
    """Origins of the results of a traced function, and its charges for each leaf."""
    jaxpr = opened(function)
    known: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, Counter())
    known.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom):
        return Counter() if isinstance(atom, core().Literal) else known[atom]

    charges = Counter()
    for equation in jaxpr.eqns:
        results, charged = _equation(equation, [read(x) for x in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
        charges += charged
    return [read(x) for x in jaxpr.outvars], charges


def _equation(equation: Any, operands: list[Origin]) -> tuple[list[Origin], Counter]:
    """Origins and charges of one equation: by name, by the function that it calls, or by shape."""
    name = equation.primitive.name
    if name in CONTROL_FLOW:
        return CONTROL_FLOW[name](equation, operands)
    if name in IDENTITIES:
        return operands, Counter()
    body = _called(equation)
    if body is not None:
        return _walk(body, operands)
    weights = _join(*(x for x in operands if x is not None))
    if None not in operands:
        if name == "concatenate":
            weights = _parts(equation, operands)
        return [weights] * len(equation.outvars), Counter()
    charges = Counter()
    if weights and equation.outvars:
        flops = _flops(equation, weights)
        charges = Counter({leaf: part * flops for leaf, part in weights.items()})
    return [None] * len(equation.outvars), charges


def _called(equation: Any) -> "Jaxpr | None":
    """Finds the one function that an equation (`jit`, `checkpoint`, `custom_jvp`…) just calls."""
    inner = functions(equation)
    if len(inner) != 1:
        return None
    jaxpr = opened(inner[0])
    same = _shapes(jaxpr.invars) == _shapes(equation.invars)
    return jaxpr if same and _shapes(jaxpr.outvars) == _shapes(equation.outvars) else None


def _shapes(atoms: Sequence[Any]) -> list[tuple | None]:
    return [getattr(x.aval, "shape", None) for x in atoms]


def _join(*origins: Origin) -> Origin:
    """Origin of a value computed from several others."""
    joined = Counter()
    for origin in origins:
        if origin is None:
            return None
        joined |= origin
    return joined


def _parts(equation: Any, operands: list[Counter]) -> Counter:
    """Origin of a concatenation of weights, each by its number of elements."""
    parts = Counter()
    total = max(equation.outvars[0].aval.size, 1)
    for atom, origin in zip(equation.invars, operands, strict=True):
        parts += Counter({leaf: x * atom.aval.size / total for leaf, x in origin.items()})
    return Counter({leaf: min(part, 1.0) for leaf, part in parts.items()})


def _flops(equation: Any, weights: Counter) -> int:
    """Operations of one equation in which weights meet activations."""
    name = equation.primitive.name
    if name in MOVES or name.startswith("scatter"):
        return 0
    out = equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * out.size * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if _is_elementwise(equation):
        return out.size
    raise ValueError(
        f"model: cannot count the operations of {name!r}, in which {_names(weights)} meets "
        "activations; write it with matrix products, convolutions and elementwise operations, or "
        "use unit='bytes'"
    )


def _is_elementwise(equation: Any) -> bool:
    """Whether an operation built into JAX broadcasts every operand to its one result."""
    if equation.primitive.name in OPAQUE or len(equation.outvars) != 1 or functions(equation):
        return False
    shape = equation.outvars[0].aval.shape
    operands = _shapes(equation.invars)
    if any(x is None or len(x) not in (0, len(shape)) for x in operands):
        return False
    return all(n in (1, m) for x in operands for n, m in zip(x, shape, strict=False))


def _convolution_flops(equation: Any) -> int:
    """Counts two for every kernel tap at every output, except taps between dilated inputs."""
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval
    _, kernel_axes, out_axes = equation.params["dimension_numbers"]
    taps = kernel[kernel_axes[1]] * out.shape[out_axes[0]] * out.shape[out_axes[1]]
    options = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    windows = zip(*(equation.params[x] for x in options), strict=True)
    axes = zip(kernel_axes[2:], out_axes[2:], strict=True)
    for (i, j), (stride, (before, _), holes, dilation) in zip(axes, windows, strict=True):
        starts = stride * np.arange(out.shape[j])[:, None]
        places = starts + dilation * np.arange(kernel[i]) - before
        taps *= int((places % holes == 0).sum())
    return 2 * taps


def _names(leaves: Counter) -> str:
    return ", ".join(repr(name) for name in leaves)


def _settle(body: "Jaxpr", constants: list, carry: list, slices: Sequence = ()) -> list[Origin]:
    """Origins of a loop's carry that hold in every step: each step only adds to them."""
    while True:
        after = _walk(body, [*constants, *carry, *slices])[0]
        joined = [_join(x, y) for x, y in zip(carry, after, strict=False)]
        if joined == carry:
            return carry
        # a part that changes from step to step counts in full, so that this ends
        carry = [
            new if new is None or new == old else Counter(dict.fromkeys(new, 1.0))
            for old, new in zip(carry, joined, strict=True)
        ]


def _scan(equation: Any, operands: list[Origin]) -> tuple[list[Origin], Counter]:
    body, length = equation.params["jaxpr"], equation.params["length"]
    # versions of JAX name these numbers differently; sliced or stacked values have another shape
    carried = _number_alike(opened(body).outvars, equation.outvars)
    last = _number_alike(opened(body).invars, equation.invars)
    first = last - carried
    constants, carry, slices = operands[:first], operands[first:last], operands[last:]
    carry = _settle(body, constants, carry, slices)
    results, charges = _walk(body, [*constants, *carry, *slices])
    charges = Counter({leaf: x * length for leaf, x in charges.items()})
    return [*carry, *results[carried:]], charges


def _number_alike(inner: Sequence[Any], outer: Sequence[Any]) -> int:
    return sum(x == y for x, y in zip(_shapes(inner), _shapes(outer), strict=True))


def _while(equation: Any, operands: list[Origin]) -> tuple[list[Origin], Counter]:
    params = equation.params
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry = _settle(params["body_jaxpr"], operands[first:last], operands[last:])
    (again,), charges = _walk(params["cond_jaxpr"], [*operands[:first], *carry])
    charges += _walk(params["body_jaxpr"], [*operands[first:last], *carry])[1]
    if charges:
        raise ValueError(
            f"model: {_names(charges)} meets activations in a while loop, whose length is not "
            "known before it runs; use jax.lax.scan, or fori_loop between two Python integers, or "
            "unit='bytes'"
        )
    return [None if again is None else x for x in carry], charges


def _cond(equation: Any, operands: list[Origin]) -> tuple[list[Origin], Counter]:
    index, *arguments = operands
    branches = [_walk(branch, arguments) for branch in equation.params["branches"]]
    charges = Counter()
    for _, charged in branches:
        charges |= charged
    results = zip(*(results for results, _ in branches), strict=True)
    return [None if index is None else _join(*origins) for origins in results], charges


CONTROL_FLOW = {"scan": _scan, "while": _while, "cond": _cond}

__all__: Sequence[str] = ("weight_costs",)
