"""Keeps the memory of a step for the next one, where the C library would hand it back."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE = 2**30


def keep_memory() -> bool:
    """Tells glibc to keep blocks of up to a gigabyte, as `MALLOC_MMAP_THRESHOLD_` would.

    On the CPU XLA asks for one block of temporary memory at every call of a compiled function, the
    largest that any of its branches might need.  glibc takes one of more than 32 MiB from the
    system each time and gives it back: every page of it that is used is then zeroed again.

    Returns:
        Whether there is a glibc that was told.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        told = [
            ctypes.CDLL(None).mallopt(what, value)
            for what, value in ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, 2 * _LARGE - 1))
        ]
        return all(told)
    return False
