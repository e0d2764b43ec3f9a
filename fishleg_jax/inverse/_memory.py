"""How much memory there is, so that what can't fit is refused before it is asked for."""

import os
from pathlib import Path

import jax

SHARE = 0.6  # of the memory that a state may take: an update needs room beside it


def available() -> int:
    """Bytes of the first device's memory; on the CPU of the machine's, or of its container's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return limit


def check(needed: int, what: str, argument: str, per_unit: int) -> None:
    """Raises a ValueError where a state would not fit.

    Args:
        needed: its bytes.
        what: the state in words.
        argument: the name of the argument that decides its size.
        per_unit: bytes for each unit of that argument, to say what would fit.
    """
    room = int(SHARE * available())
    if needed > room:
        largest = room // max(per_unit, 1)
        advice = f"the largest {argument} that fits is {largest}"
        if largest < 1:
            advice = f"no {argument} fits"
        raise ValueError(
            f"{what} needs {needed / 1e9:.3g} GB, but {room / 1e9:.3g} GB may be used here "
            f"({SHARE:.0%} of the memory): {advice}"
        )
