"""Available memory, so that states too large for it are rejected before allocation."""

import os
from pathlib import Path

import jax

SHARE = 0.6  # fraction of the memory for a state, since an update needs room as well


def available() -> int:
    """Memory of the first device in bytes; on the CPU that of the machine or its container."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # not in a container, or in one without a limit
        return limit


def check(needed: int, what: str, argument: str, per_unit: int) -> None:
    """Raises a ValueError if a state does not fit into memory.

    Args:
        needed: Size of the state in bytes.
        what: Description of the state for the error message.
        argument: Name of the argument that determines the size.
        per_unit: Bytes per unit of that argument, used to suggest a value that fits.
    """
    room = int(SHARE * available())
    if needed > room:
        largest = room // max(per_unit, 1)
        advice = f"the largest {argument} that fits is {largest}"
        if largest < 1:
            advice = f"no {argument} fits"
        raise ValueError(
            f"{what} needs {needed / 1e9:.3g} GB, but only {room / 1e9:.3g} GB may be used "
            f"({SHARE:.0%} of the memory): {advice}"
        )
