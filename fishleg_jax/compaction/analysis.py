"""Analysis of a network: its axes, its dependence on the inputs, its products with weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax.compaction import axes as _axes
from fishleg_jax.compaction import dependence, rules
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.couplings import Member, leaves_of
from fishleg_jax.compaction.tape import Step, Tape, Value, record


class Network(NamedTuple):
    """A user's function and where the leaves of its arguments belong.

    Attributes:
        function: `f(params, inputs)`, or `f(params, inputs, constants)`.
        params: Parameters, for their structure.
        constants: Constants, for their structure; None without.
    """

    function: Callable[..., Any]
    params: Any
    constants: Any | None

    def leaves(self) -> dict[str, Any]:
        """Leaves by key path; those of the constants begin with `constants/`."""
        return leaves_of(self.params, self.constants)

    def trees(self, leaves: dict[str, Any]) -> tuple[Any, Any | None]:
        """Returns parameters and constants with other leaves, of whatever shapes."""
        structure = jax.tree.structure(self.params)
        values = [leaves[name] for name in self.leaves()]  # jit sorts dictionaries
        params = structure.unflatten(values[: structure.num_leaves])
        if self.constants is None:
            return params, None
        rest = jax.tree.structure(self.constants)
        return params, rest.unflatten(values[structure.num_leaves :])

    def call(self, leaves: dict[str, Any], inputs: Any) -> Any:
        """Returns the outputs with other leaves, in full precision on every device."""
        params, constants = self.trees(leaves)
        with jax.default_matmul_precision("highest"):
            return self.function(params, inputs, *(() if constants is None else (constants,)))


class Meeting(NamedTuple):
    """A product of matrices or a convolution.

    Attributes:
        step: The operation.
        left: Dimensions of its first operand that are summed over.
        right: Dimensions of its second operand that are summed over.
        factors: Factors of the axes that are summed over.
    """

    step: Step
    left: tuple[int, ...]
    right: tuple[int, ...]
    factors: tuple[Factor, ...]

    def sides(self) -> tuple[tuple[Value, Sequence[int]], tuple[Value, Sequence[int]]] | None:
        """Activations and weights, each with the dimensions summed over; None of other pairs."""
        one, two = self.step.operands
        if one.from_inputs == two.from_inputs:
            return None
        pair = ((one, self.left), (two, self.right))
        return pair if one.from_inputs else pair[::-1]


class Analysis(NamedTuple):
    """Record of a network and of its axes.

    Attributes:
        tape: Its run on some inputs.
        values: Values of its leaves, by key path.
        meetings: All products of matrices and convolutions.
    """

    tape: Tape
    values: dict[str, Value]
    meetings: list[Meeting]

    def factor_of(self, member: Member) -> Factor | None:
        """The factor that runs over the units of a member; None if they are cut apart."""
        axis = self.values[member.name].axes[member.axis]
        known = list(_axes.factors(axis))
        place = (member.outer, member.inner)
        return next((f for f in known if place in _axes.places(axis, f)), None)


def analyse(network: Network, leaves: dict[str, Any], inputs: Any, couplings: Sequence) -> Analysis:
    """Runs a network on tape.

    Args:
        network: The network.
        leaves: Its leaves by key path, with zeros where they are pruned.
        inputs: A few inputs.
        couplings: Tuples of members that are known to be coupled.
    """
    names = list(leaves)
    tape = _taped(network, leaves, inputs)
    values = dict(zip(names, tape.arguments, strict=False))
    given = tape.arguments[len(names) :]

    # Name the axes: at first those of leaves are all different, but for the user's couplings.
    for value in values.values():
        value.axes = [_axes.new(n) for n in value.shape]
    for value in (*given, *tape.closed_over):
        reason = "is an axis of the inputs" if value in given else "is fixed by an array of f's own"
        value.axes = [_axes.new(n, reason) for n in value.shape]
    for members in couplings:
        units = _axes.new(members[0].units)
        for x in members:
            whole = [*_axes.new(x.outer), *units, *_axes.new(x.inner)]
            _axes.unify(values[x.name].axes[x.axis], whole)
    rules.name_axes(tape)
    for value in tape.outputs:
        for axis in value.axes:
            _axes.pin(axis, "is an axis of the outputs")
            _axes.mix(axis, "it is an axis of the outputs")

    meetings = [x for step in tape.steps if (x := _meeting(step)) is not None]
    for meeting in meetings:
        if all(x.from_inputs for x in meeting.step.operands):
            _axes.mix(meeting.factors, "two activations are multiplied along it")
    return Analysis(tape, values, meetings)


def _taped(network: Network, leaves: dict[str, Any], inputs: Any) -> Tape:
    """Runs a network on tape, in one compiled program."""
    names, tapes = list(leaves), []
    sizes = np.cumsum([0, *(np.size(x) for x in leaves.values())])
    numbers = [
        np.arange(start, start + np.size(x), dtype=np.int32).reshape(np.shape(x))
        for start, x in zip(sizes, leaves.values(), strict=False)
    ]

    def run(values, inputs, numbers):
        call = lambda values, inputs: network.call(dict(zip(names, values, strict=True)), inputs)
        tape = record(call, values, inputs)
        dependence.mark(tape, tape.arguments[len(names) :])
        dependence.number(tape, tape.arguments[: len(names)], numbers)
        tapes.append(tape)
        return [(x.array, x.varies, x.elements) for x in tape.values()]

    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    found = jax.device_get(compiled(list(leaves.values()), inputs, numbers))
    for value, (array, varies, elements) in zip(tapes[-1].values(), found, strict=True):
        value.array, value.varies, value.elements = array, varies, elements
    return tapes[-1]


def _meeting(step: Step) -> Meeting | None:
    if step.name == "dot_general":
        (left, right), _ = step.params["dimension_numbers"]
        summed = [f for i in left for f in _axes.factors(step.operands[0].axes[i])]
        return Meeting(step, tuple(left), tuple(right), tuple(summed))
    if step.name == "conv_general_dilated":
        inputs, kernel, _ = step.params["dimension_numbers"]
        summed = _axes.factors(step.operands[1].axes[kernel[1]])
        return Meeting(step, (inputs[1],), (kernel[1],), tuple(summed))
    return None


def couplings_of(analysis: Analysis) -> list[tuple[Member, ...]]:
    """Returns all couplings that can be permuted and are summed over somewhere."""
    members: dict[Factor, list[Member]] = {}
    for name, value in analysis.values.items():
        for i, axis in enumerate(value.axes):
            for factor in dict.fromkeys(_axes.factors(axis)):
                for outer, inner in _axes.places(axis, factor):
                    member = Member(name, i, outer, factor.size, inner)
                    members.setdefault(factor, []).append(member)
    summed = {f for meeting in analysis.meetings for f in meeting.factors}
    return [
        tuple(found)
        for factor, found in members.items()
        if factor.pinned is None and factor in summed and any(x.outer == 1 for x in found)
    ]


def first(inputs: Any, examples: int) -> Any:
    """Returns the first examples of inputs."""
    return jax.tree.map(lambda x: np.asarray(x)[:examples] if np.ndim(x) else x, inputs)
