"""Costs of the estimates of the inverse Fisher on large networks, on paper.

    python -m experiments.scaling
    python -m experiments.scaling --network 8B --method fishleg,kfac --compile 1,8

Everything is reckoned from shapes, and no weight is allocated: the bytes of a state on each of up
to 256 devices by `jax.eval_shape` of the estimator's `init` and by where the library would put it,
see `experiments.scaling.placement`; operations by tracing `update`, `multiply` and `diagonal` and
counting, and by XLA's cost analysis, see `experiments.scaling.operations`.

`--compile` takes the numbers of devices for which XLA compiles: 1 by default, 0 for none.  For
several it has as many virtual devices of the CPU, and the operations are those of each of them.
FishLeg's update takes minutes to compile, and waits for `--slow`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from tqdm import tqdm

import fishleg_jax as flj
from experiments.estimates import methods
from experiments.report import record
from experiments.running import arguments, files
from experiments.running.arguments import at_least, one_of
from experiments.scaling import operations, placement, shapes, tables
from experiments.scaling.placement import device_bytes
from fishleg_jax.inverse import _memory

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
VARIANTS: dict[str, Callable[[flj.Model], flj.InverseFisher]] = {
    "fishleg": methods.variant("fishleg"),
    "fishleg, no cap": methods.variant("fishleg", cap=None),
    "woodfisher, blocks of 64": methods.variant("woodfisher", block_size=64),
    "mfac, blocks of 128": methods.variant("mfac", block_size=128),
    "kfac": methods.variant("kfac"),
    "diagonal": methods.variant("diagonal"),
    "identity": methods.variant("magnitude"),
}
SLOW = {"fishleg": ("update",), "fishleg, no cap": ("update",)}


def short(name: str) -> str:
    """A method's name on the command line."""
    return name.split(",")[0] + ("_uncapped" if "no cap" in name else "")


def reckon(
    method: str, network: shapes.Network, compiled: Sequence[int] = (), slow: bool = False
) -> dict[str, Any]:
    """Bytes and operations of one method on one network.

    Args:
        method: a key of `VARIANTS`.
        network: as shapes.
        compiled: numbers of devices to compile for.
        slow: whether to compile functions that take minutes, too.

    Returns:
        `state_bytes` on each device, by number of devices, `flops` by function and kind of count,
        and `compiled_flops` by number of devices and function.
    """
    estimator = VARIANTS[method](network.model)
    calls = operations.estimator_calls(estimator)
    without = () if slow else SLOW.get(method, ())
    spread = {n: _spread(network, n) for n in DEVICES}
    # the check whether it fits is off: that is the question here
    with mock.patch.object(_memory, "available", lambda: 2**80):
        state = jax.eval_shape(estimator.init, network.params(network.layers))
        return {
            "state_bytes": {
                n: device_bytes(placement.spread_state(state, params))
                for n, params in spread.items()
            },
            "flops": operations.traced(calls, network),
            "compiled_flops": {
                n: operations.compiled(calls, network, n, without) for n in compiled
            },
        }


def _spread(network: shapes.Network, devices: int) -> Any:
    mesh = placement.abstract_mesh(devices)
    return placement.spread(network.params(network.layers), mesh)


def run(
    name: str, variants: Sequence[str], compiled: Sequence[int] = (), slow: bool = False
) -> list[dict]:
    """A row for each method on one network; see `reckon`."""
    network = shapes.NETWORKS[name]()
    gradient = operations.gradient_calls(network.model)
    leaves = jax.tree.leaves(network.params(network.layers))
    of_network = {
        "network": name,
        "weights": sum(math.prod(x.shape) for x in leaves),
        "examples": len(network.batch[0]),
        "weight_bytes": {n: device_bytes(_spread(network, n)) for n in DEVICES},
        "gradient_flops": operations.traced(gradient, network),
        "gradient_compiled_flops": {n: operations.compiled(gradient, network, n) for n in compiled},
    }
    return [
        {**of_network, "method": method, **reckon(method, network, compiled, slow)}
        for method in tqdm(variants, desc=name, disable=None)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = arguments.command(
        "experiments.scaling",
        "Bytes and operations of each estimate on large networks, from shapes alone.",
    )
    names = {short(name): name for name in VARIANTS}
    option = partial(arguments.option, parser)
    option("--network", one_of(shapes.NETWORKS), list(shapes.NETWORKS), several=True)
    option("--method", one_of(names), list(names), several=True)
    option(
        "--compile", at_least(0), [1], "numbers of devices to compile for, 0 for none", several=True
    )
    option("--out", Path, Path("results/scaling"))
    parser.add_argument(
        "--slow", action="store_true", help="compile FishLeg's update, too: minutes each"
    )
    record.add_option(parser)
    args = parser.parse_args(argv)
    devices = [n for n in args.compile if n]
    if max(devices, default=1) > 1:
        # before JAX is used for anything
        jax.config.update("jax_num_cpu_devices", max(devices))
    rows, variants = [], [names[name] for name in args.method]
    for network in args.network:
        found = run(network, variants, devices, args.slow)
        print(f"{tables.of_bytes(found)}\n\n{tables.of_operations(found)}\n", flush=True)
        rows += found
        path = files.write_json(args.out / "scaling.json", rows)
    print(path)
    for what, make in {"bytes": tables.of_bytes, "operations": tables.of_operations}.items():
        name = args.record and f"{args.record}_{what}"
        record.keep(name, make(rows), "experiments.scaling", argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
