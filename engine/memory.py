"""Memory that Python has freed goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trimmer() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library, or none that can be asked
        return None
    return trim


def trim() -> bool:
    """Give back what is free in glibc's heaps; whether there was a way to, and anything.

    A server's sessions come and go, and between what lives long the heaps fill with holes, which
    glibc keeps. Takes some milliseconds; other threads wait only if they allocate meanwhile.
    """
    trimmer = _trimmer()
    return trimmer is not None and bool(trimmer(0))
