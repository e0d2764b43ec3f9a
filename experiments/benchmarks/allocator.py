"""Which C library's allocator a program runs with, and how to run it with another.

On the CPU XLA asks for one block of temporary memory at every call of a compiled function, the
largest that any of its branches might need.  glibc takes one of more than 32 MiB from the system
each time and gives it back, so that every page of it that is used is zeroed and mapped anew;
jemalloc, told to keep what it has, does not.  An allocator can't be changed in a running program:

    LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1 python ...

(On Debian `apt-get install libjemalloc2`.)
"""

import os
from pathlib import Path

NAMES = ("jemalloc", "tcmalloc", "mimalloc")


def name() -> str:
    """The allocator of this process; `system` where none of those that are known is loaded."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else os.environ.get("LD_PRELOAD", "")
    return next((known for known in NAMES if known in loaded), "system")
