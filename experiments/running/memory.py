"""The highest memory of a stretch of a program."""

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

INTERVAL = 0.02  # seconds


def in_use() -> int | None:
    """Bytes that are taken on the first device; on the CPU the resident size of the process.

    Returns:
        The bytes; None on a CPU where there is no `/proc`.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return int(stats["bytes_in_use"])
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _high_water() -> int:
    # of the whole run; where this rises, it is by what is going on now
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0))


def _give_back() -> None:
    # memory freed by earlier work would be reused unseen; only glibc can be made to return it
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def planned(compiled: jax.stages.Compiled) -> int:
    """Bytes on one device that a compiled function takes while it runs, by the compiler's plan.

    Args:
        compiled: the function; its arguments count, and results as far as they do not take the
            memory of arguments that are given up.
    """
    found = compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def told(name: str, predicted: int, measured: int | None, of: str = "fit") -> str:
    """A line that has the memory of something as it was predicted, and as it was.

    Args:
        name: of the method.
        predicted: bytes, by `fishleg_jax.peak_memory` or `planned`.
        measured: bytes, by `watch`; None where they can't be known.
        of: the work that took the memory.
    """
    found = "unknown" if measured is None else f"{measured / 1e6:.0f} MB"
    return f"{name}: memory of the {of}, predicted {predicted / 1e6:.0f} MB, measured {found}"


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], int | None]]:
    """Watches the memory, by looking at it every 20 ms.

    The system's own high-water mark is that of the whole run, and would hide all that is smaller
    than what came before.  What is seen on a CPU is the whole process: compilation counts too (tens
    of megabytes, more where something is used for the first time), and what is over in less than
    20 ms may be missed.

    Yields:
        A function that gives the most bytes that were taken since it was last called, or since the
        beginning, above those that were taken at the beginning; None where that can't be known.
    """
    _give_back()
    before = in_use()
    if before is None:
        yield lambda: None
        return
    highest, water = before, _high_water()
    lock, stop = threading.Lock(), threading.Event()

    def look() -> None:
        nonlocal highest
        with lock:
            highest = max(highest, in_use())

    def keep_looking() -> None:
        while not stop.wait(INTERVAL):
            look()

    def peak() -> int:
        nonlocal highest, water
        look()
        with lock:
            new_water = _high_water()
            found = max(highest, new_water) if new_water > water else highest
            highest, water = in_use(), new_water
        return max(found - before, 0)

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
