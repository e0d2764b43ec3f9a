"""Kernels of the operators in an ONNX graph: where they are stored, and how they get there."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fishleg_jax.export import _extra

FOLDED = ("Transpose", "Reshape", "Cast", "Identity")


def kernel_axes(node: Any) -> list[tuple[int, int]]:
    """Inputs of an operator that may be kernels, each with the axis that is summed over."""
    flags = {x.name: x.i for x in node.attribute if x.name in ("transA", "transB")}
    if node.op_type == "Conv":
        return [(1, 1)]
    if node.op_type == "MatMul":
        return [(0, -1), (1, -2)]
    if node.op_type == "Gemm":
        return [(0, 0 if flags.get("transA") else 1), (1, 1 if flags.get("transB") else 0)]
    return []


def graphs(graph: Any) -> Iterator[Any]:
    """A graph, and the bodies of its loops and branches."""
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from graphs(body)


def nodes(graph: Any) -> Iterator[Any]:
    """Operators of a graph, those of a body right behind the loop or branch that it belongs to."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from nodes(body)


def names_from_inputs(graph: Any) -> set[str]:
    """Names of all values that depend on the inputs of a graph; kernels don't."""
    found = {x.name for x in graph.input} - {x.name for x in graph.initializer}
    _follow(graph, found)
    return found


def fold_kernels(onnx: Any, model: Any) -> None:
    """Carries out transpositions, reshapes and casts of kernels, and stores the results.

    `jax.lax` convolves with HWIO kernels and `Conv` with OIHW ones: a transposition stands between
    them, and TensorRT looks for 2:4 in stored kernels alone.  A kernel that something else reads,
    too, stays as it is, or it would be in the file twice.

    Args:
        onnx: The package.
        model: ONNX model, changed in place.
    """
    reference = _extra.package("onnx.reference", "to_onnx")
    graph = model.graph
    stored = {x.name: x for x in graph.initializer}
    makers = {name: node for node in nodes(graph) for name in node.output}
    reads, done = _reads(graph), set()
    results = {x.name for part in graphs(graph) for x in part.output}
    for node in nodes(graph):
        for index, _ in kernel_axes(node):
            # from the kernel back to an initializer
            kernel = name = node.input[index]
            chain = []
            while name in makers and makers[name].op_type in FOLDED:
                chain.insert(0, makers[name])
                name = makers[name].input[0]
            if name not in stored:
                continue
            if all(step.op_type == "Identity" for step in chain):
                node.input[index] = name
                continue
            others = {x for step in chain for x in step.input[1:]}  # shapes
            shared = any(reads[step.input[0]] > 1 for step in chain)
            if shared or not others <= stored.keys() or kernel in results:
                continue
            # the same steps on the initializer itself
            array = onnx.numpy_helper.to_array(stored[name])
            for step in chain:
                feeds = {x: onnx.numpy_helper.to_array(stored[x]) for x in step.input[1:]}
                evaluator = reference.ReferenceEvaluator(step)
                (array,) = evaluator.run(None, {step.input[0]: array, **feeds})
                done.add(step.output[0])
                del makers[step.output[0]]
            stored[kernel] = onnx.numpy_helper.from_array(array, kernel)
            graph.initializer.append(stored[kernel])
    _drop(graph, done)


def _reads(graph: Any) -> Counter:
    """Number of readers of each value, the outside of the graph among them."""
    reads = Counter(name for node in nodes(graph) for name in node.input)
    reads.update(x.name for part in graphs(graph) for x in part.output)
    return reads


def _drop(graph: Any, done: set[str]) -> None:
    """Takes out the operators with these outputs, and what nothing reads afterwards."""
    reads = _reads(graph)
    for part in graphs(graph):
        for i in reversed(range(len(part.node))):
            node = part.node[i]
            unread = node.op_type == "Identity" and not reads[node.output[0]]
            if unread or done.intersection(node.output):
                reads.subtract(node.input)
                del part.node[i]
    for i in reversed(range(len(graph.initializer))):
        if not reads[graph.initializer[i].name]:
            del graph.initializer[i]


def _bodies(node: Any) -> list[Any]:
    return [x.g for x in node.attribute if x.HasField("g")]


def _follow(graph: Any, found: set[str]) -> None:
    """Adds the names of a graph that depend on names found so far."""
    for node in graph.node:
        bodies = _bodies(node)
        for body in bodies:
            pairs = zip(node.input, body.input, strict=False)  # a branch has no inputs
            found.update(y.name for x, y in pairs if x in found or node.op_type == "Scan")
            size = None
            while size != len(found):  # what a loop carries may depend on inputs after a pass
                size = len(found)
                _follow(body, found)
                if node.op_type == "Loop":
                    carried = zip(body.output[1:], body.input[2:], strict=False)
                    found.update(y.name for x, y in carried if x.name in found)
        results = {x.name for body in bodies for x in body.output}
        if found.intersection(node.input) or found & results:
            found.update(node.output)
