"""Settings of the C library's allocator, which XLA's CPU backend uses for the temporaries of every step."""

import ctypes
import glob
import os
import sys

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """On CPUs, makes the C library keep freed memory for the next step. To be called before any thread starts.

    By default it returns the temporaries of a step, gigabytes at once, to the system after the step, and the next step
    waits until all pages are cleared and mapped again: up to a third of its time.

    Returns:
      Whether it is set; False without glibc, and with an accelerator, which has its own memory for temporaries.
    """
    if sys.platform != "linux" or _may_have_accelerator():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # one heap for all threads; no separate mappings, and nothing is returned to the system
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    return all([mallopt(name, value) for name, value in settings.items()])


def _may_have_accelerator() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(glob.glob(f"/dev/{name}") for name in ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd"))
