"""A network run operation by operation, with everything that it computes on record."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax._jaxpr import core, functions, opened

_SAME = """
    convert_element_type copy copy_p device_put name optimization_barrier reduce_precision
    sharding_constraint stop_gradient"""
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to
    lgamma log log1p logistic lt lt_to max min mul ne neg nextafter not or polygamma
    population_count pow real regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta"""
# Each result has the entries of the operand in its place.
SAME = frozenset(_SAME.split())
# Entry i of the result is computed from entry i of each operand, or from a scalar.  JAX keeps no
# list of them, so an operation that is not named here counts as one that mixes entries.
ELEMENTWISE = SAME | frozenset(_ELEMENTWISE.split())


@dataclasses.dataclass(eq=False)
class Value:
    """Array on the tape; compared by identity.

    Attributes:
        array: The array.
        axes: Its axes, from `rules`.
        from_inputs: Whether it was computed from the inputs, be it by a product with zeros.
        varies: Booleans of its shape, whether an entry depends on the values of the inputs; None
            for nowhere.
        elements: Numbers of the elements of leaves that its entries are copies of; None if they
            were computed.
    """

    array: Any
    axes: list = dataclasses.field(default_factory=list)
    from_inputs: bool = False
    varies: np.ndarray | None = None
    elements: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(np.shape(self.array))


class Step(NamedTuple):
    """One operation on the tape.

    Attributes:
        name: Name of the primitive; `index` and `stack` at the borders of a loop.
        params: Parameters of the primitive.
        operands: Values that enter.
        results: Values that leave.
        run: Function from the operands' arrays to the list of results, for any arrays of their
            shapes.
    """

    name: str
    params: dict[str, Any]
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    run: Callable[..., Sequence[Any]]

    def is_elementwise(self) -> bool:
        """Whether each entry of the one result depends only on the entries in its place."""
        if self.name not in ELEMENTWISE or len(self.results) != 1:
            return False
        shape = self.results[0].shape
        shapes = [x.shape for x in self.operands if x.shape]
        fits = all(len(x) == len(shape) for x in shapes)
        return fits and all(n in (1, m) for x in shapes for n, m in zip(x, shape, strict=True))


class Tape(NamedTuple):
    """Run of a function.

    Attributes:
        steps: Operations in their order, loops unrolled and calls opened.
        arguments: Values of the arguments' leaves.
        closed_over: Values of arrays that the function closes over.
        outputs: Values of the results' leaves.
    """

    steps: list[Step]
    arguments: list[Value]
    closed_over: list[Value]
    outputs: list[Value]

    def values(self) -> list[Value]:
        """All values on the tape, each once."""
        found = [*self.arguments, *self.closed_over, *self.outputs]
        for step in self.steps:
            found += [*step.operands, *step.results]
        return list(dict.fromkeys(found))


def record(function: Callable, *arguments: Any) -> Tape:
    """Runs a function of pytrees of arrays and records every operation; also under `jit`."""
    closed = jax.make_jaxpr(function)(*arguments)
    steps: list[Step] = []
    values = [Value(jnp.asarray(x)) for x in jax.tree.leaves(arguments)]
    constants = [Value(x) for x in closed.consts]
    outputs = _walk(closed.jaxpr, constants, values, steps)
    return Tape(steps, values, constants, outputs)


def _walk(jaxpr: Any, constants: Sequence, operands: Sequence, steps: list[Step]) -> list[Value]:
    """Runs a traced function on recorded values and returns its results."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *operands], strict=True))

    def read(atom):
        return Value(atom.val) if isinstance(atom, core().Literal) else known[atom]

    for equation in jaxpr.eqns:
        found = _equation(equation, [read(x) for x in equation.invars], steps)
        known.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _equation(equation: Any, operands: list[Value], steps: list[Step]) -> Sequence[Value]:
    """Runs one equation: a loop over layers or time, a call, or a primitive."""
    if equation.primitive.name == "scan":
        return _scan(equation, operands, steps)
    inner = called(equation)
    if inner is not None:
        constants = [Value(x) for x in getattr(inner, "consts", ())]
        return _walk(opened(inner), constants, operands, steps)

    def run(*arrays):
        found = equation.primitive.bind(*arrays, **equation.params)
        return found if equation.primitive.multiple_results else [found]

    return _step(equation.primitive.name, dict(equation.params), operands, run, steps)


def _step(name: str, params: dict, operands: Sequence[Value], run: Callable, steps: list[Step]):
    results = tuple(Value(x) for x in run(*(x.array for x in operands)))
    if results:
        steps.append(Step(name, params, tuple(operands), results, run))
    return results


def called(equation: Any) -> Any | None:
    """Finds the one function that an equation (`jit`, `checkpoint`, `custom_jvp`…) just calls."""
    inner = functions(equation)
    if len(inner) != 1 or equation.primitive.name in ("while", "cond"):
        return None
    jaxpr = opened(inner[0])
    pairs = ((jaxpr.invars, equation.invars), (jaxpr.outvars, equation.outvars))
    same = all([x.aval.shape for x in a] == [x.aval.shape for x in b] for a, b in pairs)
    return inner[0] if same else None


def _scan(equation: Any, operands: list[Value], steps: list[Step]) -> list[Value]:
    """Runs a scan round by round."""
    params = equation.params
    first, carried = params["num_consts"], params["num_carry"]
    body, length = params["jaxpr"], params["length"]
    inner = [Value(x) for x in body.consts]
    shared, carry = operands[:first], operands[first : first + carried]
    stacked = operands[first + carried :]
    rounds: list[list[Value]] = []
    for i in reversed(range(length)) if params["reverse"] else range(length):
        slices = [_index(x, i, steps) for x in stacked]
        found = _walk(body.jaxpr, inner, [*shared, *carry, *slices], steps)
        carry = found[:carried]
        rounds.append(found[carried:])
    if params["reverse"]:
        rounds.reverse()
    return [*carry, *(_stack(column, steps) for column in zip(*rounds, strict=True))]


def _index(value: Value, i: int, steps: list[Step]) -> Value:
    return _step("index", {}, [value], lambda x: [x[i]], steps)[0]


def _stack(values: Sequence[Value], steps: list[Step]) -> Value:
    return _step("stack", {}, values, lambda *xs: [jnp.stack(xs)], steps)[0]
