"""Gates of 1 behind units, multiplied into activations where a layer reads them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax._jaxpr import CUSTOM, apply, core, opened
from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction.analysis import Analysis
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.compaction.tape import Value, called

PRODUCTS = ("dot_general", "conv_general_dilated")
CHECKPOINTS = ("checkpoint", "remat2")


class Gate(NamedTuple):
    """Gates of one coupling on one operand of a product.

    Attributes:
        operand: Position of the activations among the operands.
        axis: Axis along which the units lie; its index is `(outer, unit, inner)`, flattened.
        outer: Number of times that the units follow each other.
        units: Number of units.
        inner: Number of neighbouring indices of one unit.
        start: Number of the first unit's gate among those of all couplings.
    """

    operand: int
    axis: int
    outer: int
    units: int
    inner: int
    start: int


Plan = tuple[tuple[Gate, ...], ...]  # the gates of every product of a network, in their order


def plan_of(analysis: Analysis, couplings: Sequence[tuple[Member, ...]]) -> Plan:
    """Returns the gates of every product in which weights read the units of a coupling."""
    weights = _from_leaves(analysis)
    starts, start = [], 0
    for members in couplings:
        starts.append((analysis.factor_of(members[0]), start))
        start += members[0].units
    plan = []
    for meeting in analysis.meetings:
        sides, gates = meeting.sides(), []
        if sides is not None and sides[1][0] in weights:
            data, along = sides[0]
            operand = meeting.step.operands.index(data)
            for factor, first in starts:
                if factor not in meeting.factors:
                    continue
                for axis in along:
                    for outer, inner in _axes.places(data.axes[axis], factor):
                        gates.append(Gate(operand, axis, outer, factor.size, inner, first))
        plan.append(tuple(gates))
    return tuple(plan)


def _from_leaves(analysis: Analysis) -> set[Value]:
    """Values that are computed from parameters or constants."""
    found = set(analysis.values.values())
    for step in analysis.tape.steps:
        if any(x in found for x in step.operands):
            found.update(step.results)
    return found


def gated(function: Callable, plan: Plan) -> Callable:
    """Returns `function` with gates: a function `(gates, *arguments)`.

    Loops stay loops, and every other operation is run as it is.

    Args:
        function: Function of pytrees of arrays that was analysed, on any number of examples.
        plan: Gates of every product.
    """

    def run(gates, *arguments):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = jax.tree.leaves(arguments)
        if sum(map(_products, closed.jaxpr.eqns)) != len(plan):
            raise ValueError(
                "model must compute the same products of matrices for every number of examples"
            )
        found = _run(closed.jaxpr, closed.consts, leaves, gates, plan)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return run


def _run(jaxpr: Any, consts: Sequence, operands: Sequence, gates: Any, plan: Plan) -> list[Any]:
    """Runs a traced function with gates on its products."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core().Literal) else known[atom]

    done = 0
    for equation in jaxpr.eqns:
        here = plan[done : done + _products(equation)]
        done += len(here)
        if any(here):
            results = _equation(equation, [read(x) for x in equation.invars], gates, here)
        else:
            results = apply(equation, jaxpr, read)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _products(equation: Any) -> int:
    """Number of products that an equation stands for, counted as the tape records them."""
    if equation.primitive.name in PRODUCTS:
        return 1
    if equation.primitive.name == "scan":
        inside = opened(equation.params["jaxpr"]).eqns
        return equation.params["length"] * sum(map(_products, inside))
    inner = called(equation)
    return 0 if inner is None else sum(map(_products, opened(inner).eqns))


def _equation(equation: Any, operands: list, gates: Any, plan: Plan) -> Sequence[Any]:
    """Runs an equation that has gates."""
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        for gate in plan[0]:
            operands[gate.operand] = _closed_by(operands[gate.operand], gate, gates)
        return [equation.primitive.bind(*operands, **params)]
    if name == "scan":
        return _scan(params, operands, gates, plan)
    if name in CUSTOM:
        raise ValueError(
            f"couplings: f reads units inside of {name!r}, whose derivative with respect to gates "
            "is not known; leave out the couplings that are read there"
        )
    inner = called(equation)
    consts = getattr(inner, "consts", ())
    run = lambda *operands: _run(opened(inner), consts, operands, gates, plan)
    if name in CHECKPOINTS:
        run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return run(*operands)


def _scan(params: dict, operands: list, gates: Any, plan: Plan) -> Sequence[Any]:
    """Runs a scan with the same gates in every round."""
    first, carried = params["num_consts"], params["num_carry"]
    shared, carry = operands[:first], operands[first : first + carried]
    body, stacked = params["jaxpr"], operands[first + carried :]
    inside = len(plan) // params["length"]
    # A first round that begins with zeros reads nothing of the inputs, and has no gates of its own.
    own = [{plan[k] for k in range(i, len(plan), inside)} - {()} for i in range(inside)]
    if any(len(x) > 1 for x in own):
        raise ValueError(
            "couplings: a loop of f reads other units in each of its rounds; leave out the "
            "couplings that are read there"
        )
    each = tuple(next(iter(x), ()) for x in own)

    def round_(carry, slices):
        found = _run(body.jaxpr, body.consts, [*shared, *carry, *slices], gates, each)
        return found[:carried], found[carried:]

    settings = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, results = jax.lax.scan(round_, carry, stacked, **settings)
    return [*carry, *results]


def _closed_by(operand: Any, gate: Gate, gates: Any) -> jax.Array:
    """An operand multiplied by gates, in their precision, and in its own dtype."""
    own = gates[gate.start : gate.start + gate.units]
    along = jnp.broadcast_to(own[:, None], (gate.outer, gate.units, gate.inner)).ravel()
    shape = [-1 if i == gate.axis else 1 for i in range(operand.ndim)]
    return (operand * along.reshape(shape)).astype(operand.dtype)
