"""What the estimates of the inverse Fisher would take on large networks, on paper.

    python -m experiments.scaling
    python -m experiments.scaling --network 8B --method fishleg,kfac

Everything is reckoned from shapes: the bytes of a state by `jax.eval_shape` of the estimator's
`init`, operations by tracing `update`, `multiply` and `diagonal` and counting, see
`experiments.operations`.  No weight is allocated and nothing is compiled.  Of a network of equal
layers one and two are traced, and what the second adds is taken times the number of layers.

The bytes on each of several devices are plain arithmetic: weights and the arrays of a state are
cut along their longest axis that the number of devices divides; what has none is whole on each.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from tqdm import tqdm

import fishleg_jax as flj
from experiments import files, operations, shapes
from experiments.arguments import comma_list, one_of
from fishleg_jax.inverse import _memory

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHOWN = (1, 8, 64, 256)
METHODS: dict[str, Callable[[flj.Model], flj.InverseFisher]] = {
    "fishleg": flj.inverse.fishleg,
    "fishleg, no cap": lambda model: flj.inverse.fishleg(model, cap=None),
    "woodfisher, blocks of 64": lambda model: flj.inverse.woodfisher(model, block_size=64),
    "mfac, blocks of 128": lambda model: flj.inverse.mfac(model, block_size=128),
    "kfac": flj.inverse.kfac,
    "diagonal": flj.inverse.diagonal,
    "identity": lambda model: flj.inverse.identity(),
}


def short(name: str) -> str:
    """A method's name on the command line."""
    return name.split(",")[0] + ("_uncapped" if "no cap" in name else "")


def device_bytes(tree: Any, devices: int) -> int:
    """The bytes of a tree on each of some devices, cut as the module says."""
    return sum(_bytes_of(x, devices) for x in jax.tree.leaves(tree))


def _bytes_of(leaf: Any, devices: int) -> int:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    divided = any(n % devices == 0 and n > 0 for n in leaf.shape)
    return size // devices if divided else size


def reckon(method: str, network: shapes.Network) -> dict[str, Any]:
    """Bytes and operations of one method on one network."""
    estimator = METHODS[method](network.model)
    # whether it fits is what is to be found out
    with mock.patch.object(_memory, "available", lambda: 2**80):
        state = jax.eval_shape(estimator.init, network.params(network.layers))
        counted = [_operations(estimator, network, layers) for layers in (1, 2)[: network.layers]]
    once, twice = counted[0], counted[-1]
    flops = {name: once[name] + (network.layers - 1) * (twice[name] - once[name]) for name in once}
    return {
        "state_bytes": {n: device_bytes(state, n) for n in DEVICES},
        **flops,
    }


def _operations(
    estimator: flj.InverseFisher, network: shapes.Network, layers: int
) -> dict[str, float]:
    params, key = network.params(layers), jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(estimator.init, params)
    update = (estimator.update, state, params, network.batch, key)
    return {
        "update_flops": operations.count(*update),
        "dearest_update_flops": operations.count(*update, dearest=True),
        "multiply_flops": operations.count(estimator.multiply, state, params),
        "diagonal_flops": operations.count(estimator.diagonal, state, params),
    }


def run(networks: Sequence[str], methods: Sequence[str]) -> list[dict]:
    """All networks and methods."""
    rows = []
    for name in networks:
        network = shapes.NETWORKS[name]()
        params = network.params(network.layers)
        weights = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        gradient = _gradient_flops(network)
        for method in tqdm(methods, desc=name, disable=None):
            rows.append(
                {
                    "network": name,
                    "weights": weights,
                    "examples": len(network.batch[0]),
                    "gradient_flops": gradient,
                    "weight_bytes": {n: device_bytes(params, n) for n in DEVICES},
                    "method": method,
                    **reckon(method, network),
                }
            )
    return rows


def _gradient_flops(network: shapes.Network) -> float:
    def gradient(params, batch):
        return jax.grad(lambda p: flj.loss(network.model, p, batch))(params)

    counted = [
        operations.count(gradient, network.params(n), network.batch)
        for n in (1, 2)[: network.layers]
    ]
    return counted[0] + (network.layers - 1) * (counted[-1] - counted[0])


def show(rows: Sequence[dict]) -> str:
    """Tables in Markdown, one for each network."""
    out = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        first = own[0]
        kind = f"{first['examples']} images"
        if name in ("1B", "8B"):
            kind = f"{first['examples']} texts of {shapes.TOKENS} tokens"
        out.append(
            f"**{name}**, {first['weights'] / 1e6:,.1f} million weights, updates of {kind}, whose "
            f"gradient takes {_number(first['gradient_flops'])} operations\n"
        )
        header = ["state, bytes on each of", *map(str, SHOWN), "numbers a weight"]
        header += ["update", "dearest", "multiply", "diagonal"]
        out += [_line(header), _line(["---"] * len(header))]
        weights = ["weights", *(_number(first["weight_bytes"][n]) for n in SHOWN)]
        out.append(_line([*weights, "1.00", "", "", "", ""]))
        for row in own:
            state = row["state_bytes"]
            cells = [row["method"], *(_number(state[n]) for n in SHOWN)]
            cells.append(f"{state[1] / 4 / row['weights']:.2f}")
            kinds = ("update", "dearest_update", "multiply", "diagonal")
            out.append(_line([*cells, *(_number(row[f"{k}_flops"]) for k in kinds)]))
        out.append("")
    return "\n".join(out)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """Three digits and a prefix."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scaling",
        description="Bytes and operations of each estimate on large networks, from shapes alone.",
    )
    names = {short(name): name for name in METHODS}
    add = parser.add_argument
    networks = comma_list(one_of(shapes.NETWORKS))
    add("--network", type=networks, default=list(shapes.NETWORKS), metavar="A,B")
    add("--method", type=comma_list(one_of(names)), default=list(names), metavar="A,B")
    add("--out", type=Path, default=Path("results/scaling"), help="default: results/scaling")
    args = parser.parse_args(argv)
    rows = run(args.network, [names[name] for name in args.method])
    print(show(rows))
    print(files.write_json(args.out / "scaling.json", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
