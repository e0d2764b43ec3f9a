"""Several processes that work on one run, each with devices and a share of every batch of its own.

    python -m experiments.one_shot --coordinator localhost:1234 --processes 2 --process-id 0 &
    python -m experiments.one_shot --coordinator localhost:1234 --processes 2 --process-id 1

All are given the same arguments but for `--process-id`, and see the same folder `--out`, into which
the first of them alone writes.  `--coordinator auto` asks the TPU pod or the cluster (Slurm, Open
MPI) who and where the others are, see `experiments/pods.md`.  A single process with a coordinator
uses all devices of its machine.  Without these arguments everything here does nothing, and there is
one process with one device.

Where one of them dies, the others end within `--heartbeat` seconds and a few more, with an error
that says so: the same command in all of them then goes on from the last checkpoint, where the
experiment keeps any.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

HEARTBEAT = 20  # seconds
DEAD = """
process {index} of {number} ends, as what stands above went wrong: where that tells of a connection,
a collective or a heartbeat, another process has died.  Start all of them again by the same command.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `joined` needs."""
    group = parser.add_argument_group("several processes, see experiments/running/processes.py")
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT|auto", help="where the first process can be reached")
    add("--process-id", type=int, metavar="I", help="which one this is, from 0")
    add("--processes", type=int, metavar="N", help="how many there are")
    add(
        "--heartbeat",
        type=int,
        default=HEARTBEAT,
        metavar="SECONDS",
        help=f"after which a process that is not heard of counts as dead; default: {HEARTBEAT}",
    )


def _check(args: argparse.Namespace) -> None:
    index, number = args.process_id, args.processes
    if (
        args.coordinator not in (None, "auto")
        and not args.coordinator.rpartition(":")[2].isdecimal()
    ):
        raise ValueError(f"--coordinator must be HOST:PORT or auto, got {args.coordinator!r}")
    if args.coordinator in (None, "auto"):
        if index is not None or number is not None:
            raise ValueError("--process-id and --processes need --coordinator HOST:PORT")
    elif index is None or number is None or not 0 <= index < number:
        raise ValueError(
            f"--coordinator needs --processes N and --process-id from 0 to N - 1, got {number} and "
            f"{index}"
        )
    if args.heartbeat < 1:
        raise ValueError(f"--heartbeat must be at least 1 second, got {args.heartbeat}")


@contextlib.contextmanager
def joined(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Iterator[None]:
    """This process as one of several; to be entered before anything is computed.

    An error ends the program at once: those that are left would wait for each other otherwise.

    Args:
        parser: one with `add_options`.
        argv: the arguments; None for those of the command line.
    """
    args = parser.parse_args(argv)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    if args.coordinator is None:
        yield
        return
    # else SIGTERM would be noted for whoever asks, and end nothing
    jax.config.update("jax_enable_preemption_service", False)
    # on the CPU; other devices have their own
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {}
    if args.coordinator != "auto":
        given = {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process_id,
        }
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=args.heartbeat)
    with contextlib.ExitStack() as quiet:
        if not is_first():
            silent = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(silent))
        try:
            yield
            wait("the end")
        except BaseException as error:
            # an orderly end would first wait minutes for one that is dead
            if isinstance(error, SystemExit):  # which has said why
                sys.stderr.flush()
                os._exit(error.code if isinstance(error.code, int) else 1)
            traceback.print_exc()
            print(
                DEAD.format(index=jax.process_index(), number=jax.process_count()),
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def several() -> bool:
    """Whether there are several processes, or one that was given a coordinator has many devices."""
    return jax.process_count() > 1 or jax.distributed.is_initialized() and jax.device_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def agreed(value: bool) -> bool:
    """The value in the first process; all processes must call this at the same time."""
    if not several():
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def mesh() -> jax.sharding.Mesh:
    """All devices of all processes in a row, along `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def everywhere(tree: Any) -> Any:
    """Arrays that are the same in all processes as ones that lie on all devices."""
    if not several():
        return tree
    whole = on_all()

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    return jax.tree.map(one, tree)


def whole(tree: Any) -> Any:
    """Arrays that may be sharded over all devices, as NumPy arrays, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def on_all() -> NamedSharding | None:
    """How weights lie: whole on all devices.  None for a single process."""
    return NamedSharding(mesh(), PartitionSpec()) if several() else None


def by_example() -> NamedSharding | None:
    """How a batch lies: cut along its examples.  None for a single process."""
    return NamedSharding(mesh(), PartitionSpec("data")) if several() else None


def share(examples: int) -> slice:
    """Which examples of a batch this process reads: the i-th part of as many as there are of them.

    Args:
        examples: of the whole batch.

    Raises:
        ValueError: they can't be dealt out equally.
    """
    if not several():
        return slice(examples)
    check_dealt(examples, "a batch of")
    part = examples // jax.process_count()
    return slice(jax.process_index() * part, (jax.process_index() + 1) * part)


def check_dealt(examples: int, name: str) -> None:
    """Raises a ValueError if examples can't be dealt out equally to all devices.

    Args:
        examples: number of examples.
        name: the batch, for the message.
    """
    if dealt(examples) != examples:
        raise ValueError(
            f"{name} {examples} can't be dealt out equally to {jax.device_count()} devices: choose "
            "another size, or other --processes"
        )


def dealt(examples: int) -> int:
    """As many examples, or a few more, as can be dealt out equally to all devices."""
    return examples + (-examples % jax.device_count() if several() else 0)


def joint(own: Any) -> Any:
    """The whole batch, as one array over all devices, of the shares of all processes."""
    if not several():
        return jax.tree.map(jnp.asarray, own)
    put = lambda x: jax.make_array_from_process_local_data(by_example(), np.asarray(x))
    return jax.tree.map(put, own)


def read(arrays: Any, rows: np.ndarray, uneven: bool = False) -> Any:
    """Some rows of arrays as a batch; each process reads its share.

    Args:
        arrays: indexed by arrays of rows, see `experiments.data.columns`.
        rows: those of the batch.
        uneven: whether a batch that can't be dealt out equally lies whole on all devices, read by
            every process; else it is refused, see `share`.
    """
    if uneven and len(rows) % jax.device_count():
        return everywhere(jax.tree.map(lambda x: jnp.asarray(x[rows]), arrays))
    own = rows[share(len(rows))]
    return joint(jax.tree.map(lambda x: x[own], arrays))


def changed(batch: jax.Array, change: Callable[[np.ndarray, tuple[int, slice]], Any]) -> jax.Array:
    """A batch whose examples each process has changed for itself.

    Args:
        batch: as `read` makes it.
        change: from the examples of a process, and of how many these are which, to as many others.
    """
    total = len(batch)
    if not several() or batch.is_fully_replicated:
        whole = change(np.asarray(batch), (total, slice(None)))
        return everywhere(jnp.asarray(whole))
    parts = {shard.index[0].start: shard.data for shard in batch.addressable_shards}
    own = np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])
    return joint(change(own, (total, share(total))))


def cores() -> int:
    """Number of CPU cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # of Linux alone
    return len(allowed(0)) if allowed else os.cpu_count() or 1
