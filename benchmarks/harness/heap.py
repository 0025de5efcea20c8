"""Memory that stays with the process: for timings that page faults do not disturb."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_MOST = 2**31 - 1


def keep_memory() -> None:
    """Let the C library keep what is freed, as the caching allocators of accelerators do; it asks the system for less
    from then on.

    By default, glibc gives large blocks back at once, and takes new ones, of which each page costs a fault when it is
    first written to; not the same number in each step, as it depends on what lies at the end of the heap.

    Raises:
        OSError: this C library has no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_TRIM_THRESHOLD, _MOST) and mallopt(_MMAP_MAX, 0)):
        raise OSError("got a C library without `mallopt`; expected glibc; leave --keep-memory out")
